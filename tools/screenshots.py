"""Takes pictures of every page of the dashboard with real runs behind it: two noise multipliers, one population.

Needs Debian's chromium and chromium-driver. `--out DIRECTORY` gets every page in both themes, wide and narrow;
`--docs` renews those that the documentation shows, in docs/images.

    python tools/screenshots.py --out /tmp/pictures
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcompute.cli.quickstart import serving
from fedcompute.cli.sample_task import POPULATION, BuiltSample, SampleTask, build_sample
from fedcompute.models.zoo import DEFAULT_MODEL
from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.listening import listen
from fedcompute.server.settings import RetryWindow, Settings

_SOON = RetryWindow(0.2, 1.0)
_SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
_TALLEST = 9000
PAGES = {
    "populations": "/",
    "population": f"/populations/{POPULATION}",
    "task": f"/tasks/{POPULATION}/1",
    "evaluation": f"/tasks/{POPULATION}/2",
    "round": f"/tasks/{POPULATION}/1/rounds/3",
    "compare": f"/compare?run={POPULATION}/1&run={POPULATION}/3",
    "privacy": "/privacy",
    "population_privacy": f"/privacy/{POPULATION}",
    "service": "/service",
    "system": "/system",
    "sign_in": "/login",
    "cancel": f"/tasks/{POPULATION}/1/cancel",
    "missing": "/tasks/nothing/1",
}
# Picture of the documentation -> page, appearance, height of the cut (0: the whole page).
_DOCS = {
    "dashboard.png": ("task", "wide", False, 1000),
    "compare.png": ("compare", "wide", False, 0),
    "privacy.png": ("population_privacy", "wide", False, 0),
    "service.png": ("service", "wide", False, 0),
    "phone.png": ("task", "narrow", True, 1700),
}


def main() -> None:
    """Runs two trainings, serves them, and takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a directory for every page in every appearance")
    parser.add_argument("--docs", action="store_true", help="renew docs/images")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--devices", type=int, default=40)
    options = parser.parse_args()
    if options.out is None and not options.docs:
        parser.error("say where to: --out DIRECTORY, --docs or both")
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed (Debian: chromium, chromium-driver)")
    with tempfile.TemporaryDirectory() as directory, _history(Path(directory), options) as url, _window() as window:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            for name, address in PAGES.items():
                for size in _SIZES:
                    for dark in (False, True):
                        theme = "dark" if dark else "light"
                        _take(window, url + address, size, dark, 0, options.out / f"{name}-{size}-{theme}.png")
        if options.docs:
            images = Path(__file__).parents[1] / "docs" / "images"
            images.mkdir(exist_ok=True)
            for file, (name, size, dark, height) in _DOCS.items():
                _take(window, url + PAGES[name], size, dark, height, images / file)


@contextmanager
def _history(directory: Path, options: argparse.Namespace) -> Iterator[str]:
    """A server with two finished trainings, the first with its evaluation; its address."""
    listener = listen("127.0.0.1", 0)
    settings = Settings(
        data_dir=directory / "data",
        port=listener.getsockname()[1],
        retry_no_task=_SOON,
        retry_no_active_task=_SOON,
        workers=1,
    )
    settings.data_dir.mkdir(mode=0o700)
    workshop = ProcessExecutor(1)
    try:
        with serving(settings, listener):
            for noise in (0.1, 0.5):
                task = SampleTask(
                    directory / f"model-{noise}", DEFAULT_MODEL, "digits", options.devices, options.rounds, noise
                )
                print(f"training with noise multiplier {noise:g} ...", flush=True)
                _train(settings, task, workshop.submit(build_sample, task).result(), evaluates=noise == 0.1)
            yield settings.base_url
    finally:
        workshop.close()


def _train(settings: Settings, task: SampleTask, sample: BuiltSample, *, evaluates: bool) -> None:
    from fedcompute.builder.artifacts import BuiltGroup, BuiltTask
    from fedcompute.builder.task_management import register_group
    from fedcompute.fleet.processes import Fleet
    from fedcompute.fleet.settings import FleetSettings
    from fedcompute.monitoring.operator_api import OperatorApi
    from fedcompute.protos import task_builder_pb2, task_pb2

    def built(parts: tuple[bytes, bytes, bytes, bytes]) -> BuiltTask:
        return BuiltTask(task_pb2.Task.FromString(parts[0]), *parts[1:])

    evaluation = built(sample.evaluation) if evaluates else None
    group = BuiltGroup(built(sample.training), evaluation, task_builder_pb2.TaskReport())
    created = register_group(settings.base_url, group)
    fleet = FleetSettings(
        server_url=settings.base_url, population=POPULATION, devices=task.devices, data=task.data, seed=task.seed
    )
    api = OperatorApi(settings.base_url)
    with Fleet(fleet, settings.data_dir / "fleet.log") as running:
        while api.task(POPULATION, created.training_task.task_id)["task"]["status"] != "COMPLETED":
            running.check()
            time.sleep(0.2)
    if evaluates:
        api.cancel(POPULATION, created.eval_task.task_id)


@contextmanager
def _window() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for switch in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(switch)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or ""))
        try:
            yield driver
        finally:
            driver.quit()


def _take(window: Any, address: str, size: str, dark: bool, height: int, file: Path) -> None:
    width, usual = _SIZES[size]
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    _resize(window, width, usual)
    window.get(address)
    whole = min(_TALLEST, window.execute_script("return document.documentElement.scrollHeight"))
    _resize(window, width, whole)
    waiting = "return document.querySelectorAll('[data-chart]:not([data-drawn])').length"
    deadline = time.monotonic() + 30
    while window.execute_script(waiting) and time.monotonic() < deadline:
        time.sleep(0.1)
    # Charts have their size now; the last of them may still be moving.
    time.sleep(0.5)
    whole = min(_TALLEST, window.execute_script("return document.documentElement.scrollHeight"))
    _resize(window, width, height or whole)
    time.sleep(0.2)
    window.save_screenshot(str(file))
    print(file, flush=True)


def _resize(window: Any, width: int, height: int) -> None:
    shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)


if __name__ == "__main__":
    main()
