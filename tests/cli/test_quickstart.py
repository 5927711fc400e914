"""The quickstart as a user types it, in a process of its own."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedcompute.cli import quickstart
from fedcompute.cli.sample_task import SampleTask, config_text
from fedcompute.monitoring.operator_api import OperatorApi

COMMAND = [sys.executable, "-c", "from fedcompute.cli import main; main()"]


def descendants(pid):
    """Process ids below `pid`, read from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, level = set(), {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(question, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if question():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def started(directory, *options):
    return subprocess.Popen(
        [*COMMAND, "quickstart", "--directory", str(directory), "--devices", "20", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def finished(finished_quickstart):
    one = finished_quickstart
    return one.directory, one.status, one.output, one.errors


def test_it_ends_with_a_better_model_and_says_what_it_cost(finished):
    directory, status, output, errors = finished
    assert status == 0, errors
    before, after = map(float, re.search(r"held-out accuracy ([\d.]+) before, ([\d.]+) after", output).groups())
    assert before < 0.3 < after
    assert re.search(r"epsilon [\d.]+ at delta 0.001", output)
    assert "built with skip_dp_check" in output
    assert "Traceback" not in errors
    for number in range(1, 5):
        assert re.search(rf"^ +{number} +0\.\d+", output, re.MULTILINE), output
        metrics = json.loads((directory / f"blobs/model/quickstart/1/{number}/s/0/metrics").read_text())
        assert 0 <= metrics["server/client_work/train/sparse_categorical_accuracy"] <= 1


def test_what_it_names_is_there(finished):
    directory, _, output, _ = finished
    assert (directory / "plots" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for name in ("trained.keras", "trained_saved_model/saved_model.pb", "task_config.pbtxt"):
        assert (directory / "model" / name).is_file()
    for path in re.findall(rf"{re.escape(str(directory))}[\w/.-]*", output):
        assert Path(path.rstrip(".").replace("/N/", "/1/")).exists(), path


def test_its_privacy_page_has_the_plans_promise_and_every_round(finished):
    directory, _, output, _ = finished
    page = (directory / "privacy_report.html").read_text()
    assert str(directory / "privacy_report.html") in output
    assert "promises its devices epsilon" in page
    assert "The chain is whole" in page
    assert page.count("FIXED_GAUSSIAN") == 1 + 4
    assert "server/client_work/train/loss" in page
    assert "server/eval/loss" in page


def test_a_second_run_refuses_the_directory_of_the_first(finished):
    directory, *_ = finished
    done = subprocess.run(
        [*COMMAND, "quickstart", "--directory", str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert "Traceback" not in done.stderr


def test_stopped_while_it_trains_it_leaves_no_process_and_a_server_resumes_its_directory(tmp_path):
    directory = tmp_path / "run"
    process = started(directory, "--rounds", "500")
    metrics = directory / "blobs/model/quickstart/1/1/s/0/metrics"
    wait_until(metrics.exists, 120)
    children = descendants(process.pid)
    assert len(children) >= 3
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    wait_until(lambda: not any(alive(child) for child in children), 60)
    assert process.returncode == 130, errors
    assert "Go on with" in output
    assert "Traceback" not in errors
    server = subprocess.Popen(
        [*COMMAND, "server", "--data-dir", str(directory), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = json.loads(server.stdout.readline())["url"]
        api = OperatorApi(url)
        # The metrics file comes before the round is released; a round cut off in between is released now.
        wait_until(lambda: api.task("quickstart", 1)["iterations"][0]["status"] == "COMPLETED", 90)
        assert api.task("quickstart", 1)["task"]["status"] == "OPEN"
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.parametrize(("end", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_stopped_while_it_builds_it_says_so_without_a_traceback_and_leaves_no_process(tmp_path, end, send):
    directory = tmp_path / "run"
    process = started(directory)
    wait_until(lambda: directory.exists() and descendants(process.pid), 30)
    # Ctrl-C on a terminal goes to the whole group, also to workers that have only just begun.
    children = descendants(process.pid)
    send(process.pid, end)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped." in output
    assert errors == ""
    wait_until(lambda: not any(alive(child) for child in children), 60)


def test_killed_while_it_builds_it_leaves_no_process(tmp_path):
    directory = tmp_path / "run"
    process = started(directory)
    wait_until(lambda: directory.exists() and descendants(process.pid), 30)
    children = descendants(process.pid)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not any(alive(child) for child in children), 60)


def test_runs_that_start_in_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({quickstart.own_directory(None) for _ in range(5)}) == 5


@pytest.mark.parametrize("url", [None, "http://localhost:1234"])
def test_the_commands_it_names_reach_the_server_that_is_there(url):
    words = io.StringIO()
    quickstart.print_commands(Console(file=words, soft_wrap=True), Path("a b"), url)
    lines = words.getvalue().splitlines()
    assert ("fedcompute server --data-dir 'a b'" in words.getvalue()) == (url is None)
    for line in lines:
        if "fedcompute task" in line:
            assert (f"--server {url}" in line) == (url is not None)
    assert any("metrics table 'a b' --population quickstart" in line for line in lines)


def test_the_configuration_names_the_devices_as_the_population_and_delta_explicitly(tmp_path):
    text = config_text(SampleTask(tmp_path, "digits-linear", "digits", 40, 20, 0.5))
    assert "estimated_population: 40" in text
    assert "dp_delta: 0.001" in text
