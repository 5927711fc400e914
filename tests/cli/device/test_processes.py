"""`fedcompute device run` and what other programs do beside it, in processes of their own."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

SERVICE = "org.example.app/org.example.app.Service"


def lines_of(process, count=1):
    """The next lines of a program, which must come within a while."""
    alarm = threading.Timer(30, process.kill)
    alarm.start()
    try:
        return [process.stdout.readline().rstrip("\n") for _ in range(count)]
    finally:
        alarm.cancel()


def device_process(**options):
    program = Path(sys.executable).parent / "fedcompute"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([program, "device", "run"], **pipes, **options)


def stopped(process, number):
    """Seconds until the program has ended after a signal; its exit code must be 0 and nothing on stderr."""
    start = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    seconds = time.monotonic() - start
    assert (process.returncode, errors) == (0, "")
    return seconds


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def memory(process):
    """Bytes of a process that lie in memory."""
    (line,) = (one for one in Path(f"/proc/{process.pid}/status").read_text().splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_device_runs_until_it_is_told_to_stop(installed, start, isolated, directory, number):
    running = start("fedcompute", "device", "run")
    assert lines_of(running) == [f"device in {directory}; stop with Ctrl-C"]
    wait_until(lambda: len(json.loads(installed("status", "--json"))["background_jobs"]) == 4)
    assert ", running" in installed("status")
    assert stopped(running, number) < 2
    assert ", not running" in installed("status")
    shown = installed("logs")
    assert "maintenance              ok" in shown


def test_an_idle_device_is_small_and_tells_programs_what_happens(installed, start, isolated):
    running = start("fedcompute", "device", "run", "--json")
    events = [json.loads(line) for line in lines_of(running, 8)]
    assert {one["job"] for one in events} == {"delete_expired", "download", "encryption_key_fetch", "maintenance"}
    assert [one["event"] for one in events] == ["started", "ended"] * 4
    assert all(one["success"] for one in events if one["event"] == "ended")
    if sys.platform == "linux":
        assert memory(running) < 60 << 20
    assert stopped(running, signal.SIGTERM) < 2


def test_a_device_runs_once(installed, start, program, isolated):
    running = start("fedcompute", "device", "run")
    lines_of(running)
    second = program("fedcompute", "device", "run")
    assert (second.returncode, second.stdout) == (1, "")
    assert "Code:   data_in_use" in second.stderr
    assert stopped(running, signal.SIGTERM) < 2


def test_a_device_that_cannot_start_says_why_without_a_traceback(program, tmp_path, isolated):
    (tmp_path / "lock").mkdir()
    for options in (["--device-dir", tmp_path], ["--enrolment", tmp_path / "none"]):
        ended = program("fedcompute", "device", "run", *options, env={"FEDCOMPUTE_DEVICE_DIR": str(tmp_path / "other")})
        assert ended.returncode == 1
        assert ended.stderr.startswith("Error:  ")
        assert "Traceback" not in ended.stderr
        assert "Remedy: " in ended.stderr


def test_modules_in_the_working_directory_do_not_replace_those_of_a_device(installed, directory, tmp_path, isolated):
    for name in ("asyncio", "logging", "fedcompute"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    running = device_process(cwd=tmp_path)
    assert lines_of(running) == [f"device in {directory}; stop with Ctrl-C"]
    assert stopped(running, signal.SIGINT) < 2


def test_a_device_whose_reader_leaves_ends_quietly(installed, isolated):
    running = device_process()
    running.stdout.close()
    with running.stderr:
        assert running.stderr.read() == ""
    assert running.wait(20) == 1


def test_logs_follow_what_happens_until_they_are_interrupted(installed, start, isolated):
    installed("execute", "--param", "word=before")
    following = start("fedcompute", "device", "logs", "--follow")
    assert "on_execute" in lines_of(following, 2)[0]
    installed("execute", "--param", "word=after")
    entry, output = lines_of(following, 2)
    assert "on_execute               ok" in entry
    assert output == "    | asked {'word': 'after'}"
    assert stopped(following, signal.SIGINT) < 2


def test_a_running_device_runs_a_task_and_downloads_when_told_to(installed, write_app, start, server, isolated, vendor):
    installed("install", write_app(server=server.url, download=f"{vendor.url}/data.json"))
    vendor.publish(3600, greeting="hello")
    assert f"{SERVICE}-{'0' * 64}  ok  1 values came, remote data has 1 now\n" == installed("download")
    (row,) = json.loads(installed("download", "--json"))
    assert (row["outcome"], row["detail"]) == ("discarded", "sync token 3600 is not above 3600, the stored one")
    installed("schedule", "digits", "--every", "1m")
    running = start("fedcompute", "device", "run")
    lines_of(running)
    assert "digits: no_active_task_exists" in installed.refused("run-now", "digits")["Error"]
    vendor.publish(7200, greeting="hello", other="word")
    assert "  ok  2 values came, remote data has 2 now" in installed("download")
    installed("config", "put", "condition_unmetered", "false")
    assert "the running device waits: metered network" in installed.refused("download")["Error"]
    installed("config", "put", "global_kill_switch", "true")
    assert installed.refused("run-now", "digits")["Error"] == "global_kill_switch is on"
    assert stopped(running, signal.SIGTERM) < 2


class Vendor:
    def __init__(self, folder, url):
        self.folder, self.url = folder, url

    def publish(self, sync_token, **contents):
        items = [{"key": key, "data": data} for key, data in contents.items()]
        (self.folder / "data.json").write_text(json.dumps({"syncToken": sync_token, "contents": items}))


@pytest.fixture
def vendor(tmp_path):
    """A vendor's web server on localhost."""
    folder = tmp_path / "vendor"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield Vendor(folder, f"http://localhost:{served.server_port}")
    served.shutdown()
    served.server_close()
    thread.join(10)


def test_a_download_that_fails_is_an_exit_code(installed, write_app, vendor, isolated):
    assert installed("download") == "no installed app declares a download\n"
    installed("install", write_app(download=f"{vendor.url}/gone.json"))
    assert "server_answer_invalid  vendor data: the server answers 404" in installed("download", code=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        installed("install", write_app(download=f"http://localhost:{taken.getsockname()[1]}/x"))
        installed("config", "put", "http_request_retry_limit", "1")
        assert "server_unreachable" in installed("download", code=1)


def test_nobody_else_can_read_what_commands_leave(installed, directory, isolated):
    old = os.umask(0)
    try:
        installed("execute")
        installed("download")
    finally:
        os.umask(old)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (directory, *directory.rglob("*")))
    assert (directory / "lock").exists()
