"""Every page with the real data of a finished run: it loads, it is clean, and its charts are the files."""

import json
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest

WIDE, NARROW = (1280, 900), (390, 844)
TRAINING, EVALUATION = "quickstart/1", "quickstart/2"
PAGES = (
    "/",
    "/populations/quickstart",
    f"/tasks/{TRAINING}",
    f"/tasks/{EVALUATION}",
    f"/tasks/{TRAINING}/rounds/2",
    "/compare",
    "/privacy",
    "/privacy/quickstart?verify=1",
    "/service",
    "/system",
    f"/tasks/{TRAINING}/clone",
    "/login",
)
ACCURACY = "server/client_work/train/sparse_categorical_accuracy"
LOSS = "server/client_work/train/loss"


@pytest.mark.parametrize(("size", "dark"), [(WIDE, False), (NARROW, True)], ids=["wide-light", "narrow-dark"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_whole_fits_the_window_and_asks_nobody_else(window, finished, page, size, dark):
    window.open(finished.settings.base_url + page, size=size, dark=dark)
    assert window.text("h1")
    width = window.run("return document.documentElement.scrollWidth")
    assert width <= size[0], f"{width} pixels wide"
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark


def rounds_of(finished, task, name):
    """A metric of a task's files: rounds and values."""
    root = Path(finished.settings.data_dir) / "blobs/model/quickstart" / str(task)
    files = {int(path.parts[-4]): json.loads(path.read_text()) for path in root.glob("*/s/0/metrics")}
    numbers = sorted(number for number, values in files.items() if name in values)
    return numbers, [files[number][name] for number in numbers]


def test_the_charts_of_a_task_have_the_values_of_its_files(window, finished):
    window.open(f"{finished.settings.base_url}/tasks/{TRAINING}")
    window.see_all()
    charts = window.charts()
    assert all(window.run("return [...document.querySelectorAll('[data-drawn]')].map(one => one.dataset.drawn)"))
    evaluated = {
        one["iteration_id"]: one["evaluated_iteration_id"] for one in finished.api.task("quickstart", 2)["iterations"]
    }
    for name in (ACCURACY, LOSS):
        training, evaluation = charts[f"/charts/tasks/{TRAINING}/metric?name={quote(name, safe='')}&"]
        assert (training["name"], evaluation["name"]) == ("training", "evaluation")
        assert (training["x"], training["y"]) == rounds_of(finished, 1, name)
        numbers, values = rounds_of(finished, 2, name.replace("client_work/train", "eval"))
        points = dict(zip((evaluated[number] for number in numbers), values, strict=True))
        assert dict(zip(evaluation["x"], evaluation["y"], strict=True)) == points
        assert len(training["x"]) == 4


def test_the_charts_of_devices_time_and_privacy_have_the_values_of_the_api(window, finished):
    window.open(f"{finished.settings.base_url}/tasks/{TRAINING}")
    window.see_all()
    charts, view = window.charts(), finished.api.task("quickstart", 1)
    rounds = view["iterations"]
    devices = {
        one["name"]: dict(zip(one["x"], one["y"], strict=True)) for one in charts[f"/charts/tasks/{TRAINING}/devices?"]
    }
    for one in rounds:
        for status, count in one["assignments"].items():
            assert devices[status.lower().replace("_", " ")][one["iteration_id"]] == count
    ledger = view["ledger"]
    spent, promise, left = charts[f"/charts/tasks/{TRAINING}/epsilon?"]
    assert spent["y"] == [entry["cumulative_epsilon"] for entry in ledger]
    assert promise["y"][0] == pytest.approx(left["y"][0] + spent["y"][0])
    (noise,) = charts[f"/charts/tasks/{TRAINING}/noise?"]
    assert noise["y"] == [0.5] * 4
    (clip,) = charts[f"/charts/tasks/{TRAINING}/clip?"]
    assert clip["y"] == [entry["clip_norm"] for entry in ledger]
    phases = charts[f"/charts/tasks/{TRAINING}/phases?"]
    assert [one["name"] for one in phases] == ["collect", "aggregate", "apply"]
    (completion,) = charts[f"/charts/tasks/{TRAINING}/completion?"]
    together = [sum(values) / 60 for values in zip(*(one["y"] for one in phases), strict=True)]
    assert completion["y"] == pytest.approx(together)
    minutes = charts[f"/charts/tasks/{TRAINING}/minutes"]
    whole = {one["name"]: sum(one["y"]) for one in minutes}
    assert whole["assigned"] == sum(sum(one["assignments"].values()) for one in rounds)


def test_the_numbers_below_a_chart_are_its_points(window, finished):
    window.open(f"{finished.settings.base_url}/tasks/{TRAINING}")
    window.run("document.querySelector('[data-chart] details').open = true")
    script = """
        const body = document.querySelector('[data-chart] tbody');
        return body && [...body.rows].map(row => [...row.cells].map(cell => cell.textContent));
    """
    rows = window.wait(lambda: window.run(script))
    points = zip(*rounds_of(finished, 1, ACCURACY), strict=True)
    assert rows[:4] == [["training", str(number), str(value)] for number, value in points]


def test_two_runs_are_compared_under_names_made_of_what_differs(window, finished, hand_made):
    from fedcompute.protos import learning_pb2

    for noise in (0.1, 0.3):
        process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=noise, report_goal=2))
        name = f"noise{noise}"
        task_id = finished.api.open_task(name, process, goal=2, room=2, rounds=2)
        for number in (1, 2):
            for _ in range(2):
                finished.api.contribute(name, hand_made.update_of(process, [0.1 * one for one in hand_made.initial]))
            finished.api.wait_for(name, task_id, "COMPLETED", number)
    window.open(f"{finished.settings.base_url}/compare?run=noise0.1/1&run=noise0.3/1")
    (address,) = [one for one in window.charts() if "measure" not in one]
    drawn = window.charts()[address]
    assert [one["name"] for one in drawn] == ["noise multiplier 0.1", "noise multiplier 0.3"]
    assert [one["x"] for one in drawn] == [[1, 2], [1, 2]]
    for one, name in zip(drawn, ("noise0.1", "noise0.3"), strict=True):
        stored = {
            row["iteration_id"]: row["value"]
            for row in finished.api.task(name, 1)["metrics"]
            if row["name"].endswith("accuracy")
        }
        assert one["y"] == [stored[1], stored[2]]
    assert "noise multiplier" in window.text("#table")


def test_a_page_is_used_by_keyboard_and_read_aloud(window, finished):
    from selenium.webdriver.common.keys import Keys

    for page in PAGES:
        window.open(finished.settings.base_url + page)
        faults = window.run("""
            const faults = [];
            for (const one of document.querySelectorAll('a, button, select, input, summary, textarea')) {
              if (one.type === 'hidden' || one.closest('[hidden]')) continue;
              const name = one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.[0]?.innerText || '';
              if (!name) faults.push('no name: ' + one.outerHTML.slice(0, 120));
            }
            for (const one of document.querySelectorAll('.scroll'))
              if (one.tabIndex < 0 || !one.getAttribute('aria-label')) faults.push('not reached: ' + one.className);
            for (const one of document.querySelectorAll('th:not([scope])')) faults.push('of nothing: ' + one.innerText);
            if (document.querySelectorAll('h1').length !== 1) faults.push('not one h1');
            if (!document.documentElement.lang) faults.push('no language');
            const levels = [...document.querySelectorAll('h1, h2, h3')].map(one => Number(one.tagName[1]));
            return [faults, levels];
        """)
        assert faults[0] == [], page
        assert all(after - before <= 1 for before, after in pairwise(faults[1])), page
    window.open(finished.settings.base_url + "/")
    body = window.driver.switch_to.active_element
    body.send_keys(Keys.TAB)
    assert window.run("return document.activeElement.innerText") == "Skip to the content"
    reached = set()
    for _ in range(30):
        window.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(window.run("return document.activeElement.innerText"))
    assert {"Populations", "Compare", "Privacy", "quickstart", "task 1"} <= reached


def test_the_theme_that_was_chosen_stays(window, finished):
    window.open(finished.settings.base_url + "/", dark=False)
    window.run("document.querySelector('[data-theme-switch]').click()")
    assert window.run("return getComputedStyle(document.documentElement).colorScheme") == "dark"
    window.open(finished.settings.base_url + "/system", dark=False)
    assert window.run("return document.documentElement.dataset.theme") == "dark"
    window.run("localStorage.clear()")


def test_runs_are_compared_at_a_prompt_too(finished, tmp_path):
    from typer.testing import CliRunner

    from fedcompute.cli import app

    server = ["--server", finished.settings.base_url]
    result = CliRunner().invoke(
        app, ["task", "compare", TRAINING, EVALUATION, "--json", "--out", str(tmp_path), *server]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert [one["run"] for one in document["runs"]] == [TRAINING, EVALUATION]
    assert document["runs"][0]["metrics"]["loss"]["final"] == rounds_of(finished, 1, LOSS)[1][-1]
    assert document["runs"][0]["metrics"]["loss"]["best"] == min(rounds_of(finished, 1, LOSS)[1])
    assert document["runs"][0]["facts"]["noise multiplier"] == 0.5
    assert "kind" in document["differing"]
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in document["files"])
    shown = CliRunner().invoke(app, ["task", "compare", TRAINING, EVALUATION, *server])
    assert "loss, final" in shown.output
    assert CliRunner().invoke(app, ["task", "compare", TRAINING, *server]).exit_code == 1
