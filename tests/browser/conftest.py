"""Headless Chromium against a real server: the finished quickstart run, and hand-made tasks beside it."""

import contextlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

_SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WIDE, NARROW = (1280, 900), (390, 844)


def _server_parts():
    name = "server_test_parts"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "server" / "conftest.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Browser:
    """One window. What its pages complained about, and whom they asked, is read from the browser's own logs."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, address, *, size=WIDE, dark=False) -> None:
        """Loads a page and waits until the charts in view are drawn."""
        self.appearance(size, dark=dark)
        self.driver.get(address)
        self.settled()

    def appearance(self, size, *, dark) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, question, seconds=20):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: question())

    def settled(self) -> None:
        """Waits until every chart that is near the window shows its numbers."""
        self.wait(lambda: self.run("return document.readyState") == "complete")
        # The first look at what is near the window comes with the next frame.
        self.wait(lambda: self.run("return [...document.querySelectorAll('[data-chart]')].every(f => f.dataset.near)"))
        waiting = "return document.querySelectorAll('[data-chart][data-near=yes]:not([data-drawn])').length"
        self.wait(lambda: self.run(waiting) == 0)

    def see_all(self) -> None:
        """Brings every chart near the window, so that each is drawn."""
        width = self.run("return innerWidth")
        height = self.run("return document.documentElement.scrollHeight")
        metrics = {"width": width, "height": min(height, 16_000), "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.wait(lambda: self.run("return document.querySelectorAll('[data-chart]:not([data-drawn])').length") == 0)

    def charts(self):
        """Address -> its traces as Plotly holds them: name, x, y."""
        script = """
            return [...document.querySelectorAll('[data-chart]')].map(figure => [figure.dataset.chart,
              (figure.querySelector('.js-plotly-plot')?.data ?? []).map(
                one => ({name: one.name, x: [...one.x], y: [...one.y]}))]);
        """
        return dict(self.run(script))

    def text(self, selector="main"):
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def click(self, words):
        """Presses the one button or link that has these words."""
        from selenium.webdriver.common.by import By

        found = [
            one
            for one in self.driver.find_elements(By.CSS_SELECTOR, "main a, main button")
            if one.text.strip() == words
        ]
        assert len(found) == 1, f"{words!r}: {len(found)} of them"
        self.run("arguments[0].scrollIntoView({block: 'center'})", found[0])
        found[0].click()

    def complaints(self):
        """What the console said since the last call, and requests to another host or scheme."""
        said = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        return said + [f"asked {address}" for address in self.asked() if not _is_ours(address)]

    def asked(self):
        """Every address that was asked for since the last call."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found

    def screenshot(self, path) -> None:
        path.write_bytes(self.driver.get_screenshot_as_png())


def _is_ours(address) -> bool:
    parts = urlsplit(address)
    return parts.hostname in ("127.0.0.1", "localhost") or parts.scheme in ("data", "blob", "about")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A window of Debian's Chromium; the tests skip where there is none."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (*_SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    driver.set_page_load_timeout(60)
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def window(browser):
    """The browser, signed out and without old complaints; at the end it must have none of its own."""
    browser.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    browser.complaints()
    yield browser
    complaints = browser.complaints()
    # A page that stays open would go on asking a server that is gone.
    browser.driver.get("about:blank")
    browser.complaints()
    assert complaints == []


@pytest.fixture(scope="session")
def serve(tmp_path_factory, finished_quickstart):
    """`with serve(**settings) as running:` a server over a copy of the quickstart run."""

    @contextlib.contextmanager
    def serving(**changes):
        directory = tmp_path_factory.mktemp("served") / "data"
        shutil.copytree(finished_quickstart.directory, directory)
        running = _server_parts().Running(_server_parts().settings_of(directory, **changes))
        try:
            yield running
        finally:
            running.stop()
            shutil.rmtree(directory)

    return serving


@pytest.fixture(scope="module")
def finished(serve):
    """A server over the finished quickstart run, for a whole test file."""
    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def hand_made():
    """What the server's tests make by hand: processes, plans, updates."""
    return _server_parts().HandMade()
