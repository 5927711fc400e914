"""`fedcompute device ...` as people type it: real services in isolation, real device directories, real processes."""

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
import typer

from fedcompute.cli import device as device_commands
from fedcompute.device.isolation.probe import probe

SERVICE = "org.example.app/org.example.app.Service"
CODE = """
from datetime import timedelta
from fedcompute.device import *

class Service(IsolatedService):
    def on_request(self, token):
        return Worker(self.get_federated_compute_scheduler(token), self.get_remote_data(token))

class Worker(IsolatedWorker):
    def __init__(self, scheduler, remote):
        self.scheduler, self.remote = scheduler, remote

    def on_execute(self, request):
        params = dict(request.app_params)
        print("asked", params)
        if "fail" in params:
            raise KeyError(params["fail"])
        if "schedule" in params:
            interval = TrainingInterval(SchedulingMode.RECURRENT, timedelta(hours=12))
            self.scheduler.schedule(Params(interval), FederatedComputeInput(params["schedule"]))
        return ExecuteOutput(rendering_config=RenderingConfig() if params.get("show") else None)

    def on_render(self, request):
        return RenderOutput(content=f"<p>{request.width} {request.height}</p>")

    def on_download_completed(self, request):
        return DownloadCompletedOutput(sorted(request.downloaded_contents.key_set()))
"""


@pytest.fixture(scope="module")
def isolated():
    missing = [one.name for one in probe() if not one.enforced]
    if missing:
        pytest.skip(f"this machine cannot isolate: {', '.join(missing)}")


@pytest.fixture
def write_app(tmp_path):
    """Returns write(name, server=..., download=None) -> folder of an app; its service is `org.example.NAME.Service`."""

    def write(name="app", server="http://localhost:1", download=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "service.py").write_text(CODE)
        manifest = f'[service]\nname = "org.example.{name}.Service"\n'
        if server is not None:
            manifest += f'[federated-compute-settings]\nurl = "{server}"\n'
        if download is not None:
            manifest += f'[download-settings]\nurl = "{download}"\n'
        (folder / "odp.toml").write_text(manifest)
        return folder

    return write


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The device's directory, which commands take from the environment."""
    monkeypatch.setenv("FEDCOMPUTE_DEVICE_DIR", str(tmp_path / "device"))
    return tmp_path / "device"


@pytest.fixture
def device(fedcompute, directory):
    """Returns device(*arguments, code=0) -> what `fedcompute device ...` prints; fails on another exit code."""

    def run(*arguments, code=0):
        result = fedcompute("device", *arguments)
        assert result.exit_code == code, result.output
        # A traceback would stand for an error that nobody has thought of.
        assert code == 0 or result.exception is None or isinstance(result.exception, SystemExit)
        return result.output

    return run


@pytest.fixture
def installed(device, write_app):
    device("install", write_app())
    for name in ("condition_idle", "condition_unmetered"):
        device("config", "put", name, "true")
    return device


def printed(output):
    return json.loads(output)


def refused(device, *arguments):
    """The block of an error: what, code, remedy."""
    lines = device(*arguments, code=1).splitlines()
    assert [line.split(":")[0] for line in lines if line[:1].isalpha()] == ["Error", "Code", "Remedy"], lines
    return {line.split(":")[0]: line.partition(":")[2].strip() for line in lines if line[:1].isalpha()}


def commands(group, path):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, [*path, name])
        else:
            yield [*path, name]


EVERY = list(commands(typer.main.get_command(device_commands.app), []))


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_command_explains_itself_with_an_example(device, path):
    assert f"Example: fedcompute device {' '.join(path)}" in " ".join(device(*path, "--help").split())


def test_help_of_the_group_lists_every_command(device):
    shown = device("--help")
    assert all(path[0] in shown for path in EVERY)


# Apps


def test_an_app_is_installed_listed_replaced_and_removed(device, write_app):
    folder = write_app()
    assert device("apps") == "no apps; install one with `fedcompute device install FOLDER`\n"
    assert f"installed {SERVICE}" in device("install", folder)
    told = {"service": SERVICE, "server": "https://learn.example", "download": "https://vendor.example/d.json"}
    write_app(server=told["server"], download=told["download"])
    assert printed(device("install", folder, "--json")) == told
    assert printed(device("apps", "--json")) == [{"code": str(folder), **told}]
    assert "https://learn.example" in device("apps")
    assert SERVICE in device("uninstall")
    assert printed(device("apps", "--json")) == []


def test_a_bad_manifest_is_refused_with_its_line(device, write_app):
    folder = write_app()
    with (folder / "odp.toml").open("a") as file:
        file.write('[download-setting]\nurl = "https://vendor.example"\n')
    error = refused(device, "install", folder)
    assert f"{folder}/odp.toml:5: unknown table" in error["Error"]
    assert error["Code"] == "manifest_invalid"


def test_a_manifest_may_lie_elsewhere_and_of_several_one_is_named(device, write_app, tmp_path):
    folder = write_app()
    elsewhere = (folder / "odp.toml").rename(tmp_path / "odp.toml")
    assert "neither odp.toml" in refused(device, "install", folder)["Error"]
    assert "installed" in device("install", folder, "--manifest", elsewhere)
    for name in ("one", "two"):
        settings = '<on-device-personalization><service name="org.example.app.Service"/></on-device-personalization>'
        (folder / f"{name}.xml").write_text(settings)
    assert "2 manifests" in refused(device, "install", folder)["Error"]


def test_an_app_around_the_device_s_directory_is_refused_before_there_is_one(device, write_app, directory):
    folder = write_app()
    error = refused(device, "install", folder, "--device-dir", folder / "device")
    assert "which services may read" in error["Error"]
    assert not (folder / "device").exists()
    (folder / "link").symlink_to(folder)
    refused(device, "install", folder / "link", "--device-dir", folder / "deep" / "device")
    assert not directory.exists()


def test_a_url_that_devices_refuse_is_warned_of(device, write_app):
    shown = device("install", write_app(server="http://learn.example"))
    assert "warning: federated-compute-settings: neither https:// nor http://localhost:<port>" in shown
    assert "warning" not in device("install", write_app())


@pytest.mark.parametrize(
    "arguments",
    [["uninstall"], ["execute"], ["schedule", "digits"], ["cancel", "digits"], ["run-now", "digits"]],
    ids=" ".join,
)
def test_without_an_app_or_with_several_it_is_said_which_could_be_meant(device, write_app, arguments):
    error = refused(device, *arguments)
    assert (error["Error"], "device install" in error["Remedy"]) == ("no app is installed", True)
    device("install", write_app())
    device("install", write_app("other"))
    error = refused(device, *arguments)
    assert error["Error"] == f"several services could be meant: {SERVICE}, org.example.other/org.example.other.Service"
    assert "--service" in error["Remedy"]
    assert "nothing is not installed" in refused(device, *arguments, "--service", "nothing")["Error"]


# Execute


def test_a_service_answers_and_what_it_printed_stands_in_the_log(installed, isolated):
    def execute(*params):
        return installed("execute", *(f"--param={one}" for one in params))

    assert execute("word=a=b", "count=3", "share=-0.5e1", "yes=true") == f"{SERVICE} answered; nothing to show\n"
    execute("code=007", "name=nan", "minus=-", "empty=")
    log = installed("logs")
    assert "on_execute               ok\n" in log
    assert "    | asked {'word': 'a=b', 'count': 3, 'share': -5.0, 'yes': True}\n" in log
    assert "    | asked {'code': '007', 'name': 'nan', 'minus': '-', 'empty': ''}\n" in log
    assert "asked" not in installed("logs", "--no-output")
    assert len(installed("logs", "--limit", 1).splitlines()) == 2
    (first, second) = map(json.loads, installed("logs", "--json").splitlines())
    assert (first["subject"], first["outcome"], second["service"].partition("-")[0]) == ("on_execute", "ok", SERVICE)
    assert installed("logs", "--service", SERVICE) == log


def test_what_a_service_shows_is_printed(installed, isolated):
    assert installed("execute", "--param", "show=1") == f"{SERVICE} answered; it has something to show\n"
    assert installed("execute", "--param", "show=1", "--render", "320x240") == "<p>320 240</p>\n"
    assert installed("execute", "--render", "320x240") == f"{SERVICE} answered; nothing to show\n"
    answer = printed(installed("execute", "--param", "show=1", "--render", "1x2", "--json"))
    assert answer == {"service": SERVICE, "has_surface": True, "html": "<p>1 2</p>"}


def test_a_service_that_fails_is_an_error_that_leads_to_its_traceback(installed, isolated):
    error = refused(installed, "execute", "--param", "fail=of the user")
    assert (error["Error"], error["Code"]) == ("the service failed [isolated_service_failed]", "worker_failed")
    assert "fedcompute device logs" in error["Remedy"]
    assert "KeyError: 'of the user'" in installed("logs")


def test_a_caller_that_the_list_excludes_gets_an_error(installed):
    installed("config", "put", "caller_app_allow_list", "org.example.other")
    assert "caller_app_allow_list" in refused(installed, "execute", "--caller", "org.example.caller")["Error"]


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--param", "alone"),
        ("--param", "=value"),
        ("--param", f"big={1 << 63}"),
        ("--render", "320"),
        ("--render", "0x240"),
        ("--render", "-1x240"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(installed, option, text):
    error = refused(installed, "execute", f"{option}={text}")
    assert (error["Error"].split(":")[0], error["Code"]) == (f"{option} {text}", "settings_invalid")


# Tasks


def test_a_task_is_scheduled_shown_and_cancelled(installed):
    assert "no tasks; schedule one" in installed("status")
    assert "digits: next run 20" in installed("schedule", "digits")
    task = printed(installed("schedule", "letters", "--every", "12h", "--json"))
    assert (task["population"], task["recurrent"], task["minimum_interval"]) == ("letters", True, 43_200_000)
    shown = installed("status")
    assert "digits  once, job " in shown
    assert "letters  every 43200 s, job " in shown
    assert "not running; start `fedcompute device run`" in shown
    document = printed(installed("status", "--json"))
    assert (document["running"], [one["population"] for one in document["tasks"]]) == (False, ["digits", "letters"])
    assert installed("cancel", "digits") == "digits is cancelled\n"
    assert installed("cancel", "digits") == "digits was not scheduled\n"
    assert [one["population"] for one in printed(installed("status", "--json"))["tasks"]] == ["letters"]


def test_status_says_what_tasks_wait_for(installed):
    installed("config", "put", "condition_idle", "false")
    installed("config", "put", "condition_battery_percent", "7")
    installed("config", "put", "federated_compute_kill_switch", "true")
    shown = installed("status")
    for words in ("not idle", "battery 7 %, below 30 %", "federated_compute_kill_switch is on"):
        assert words in shown
    assert "not idle" in printed(installed("status", "--json"))["waits_for"]


@pytest.mark.parametrize("every", ["0s", "12", "h", "-1h", "1.5h", "9" * 12 + "d", "1 h", "1w", ""])
def test_a_length_of_time_that_is_none_is_refused(installed, every):
    error = refused(installed, "schedule", "digits", f"--every={every}")
    assert "is no length of time" in error["Error"]
    assert "12h" in error["Remedy"]


@pytest.mark.parametrize("population", ["", " ", "a/b", "a?b", "a\x1b[31m"])
def test_a_population_that_no_url_can_hold_is_refused(installed, population):
    assert "is no name of a population" in refused(installed, "schedule", population)["Error"]


def test_a_task_that_is_refused_says_why(installed, write_app):
    installed("consent", "revoke", "measurement")
    assert "measurement consent is revoked" in refused(installed, "schedule", "digits")["Error"]
    installed("consent", "give")
    installed("install", write_app(server=None))
    assert "the manifest names no server" in refused(installed, "schedule", "digits")["Error"]


def test_a_task_runs_now_without_a_running_device(installed, write_app, server):
    installed("install", write_app(server=server.url))
    assert refused(installed, "run-now", "digits")["Error"] == "digits is not scheduled"
    installed("schedule", "digits")
    error = refused(installed, "run-now", "digits")
    assert error["Error"].startswith("digits: no_active_task_exists: ")
    assert error["Code"] == "run_failed"
    answer = printed(installed("run-now", "digits", "--json", code=1))
    assert (answer["population"], answer["outcome"]) == ("digits", "no_active_task_exists")
    assert "next in" in answer["detail"]


def test_a_task_that_cannot_run_now_is_not_waited_for(installed):
    installed("schedule", "digits")
    installed("config", "put", "global_kill_switch", "true")
    error = refused(installed, "run-now", "digits")
    assert (error["Error"], "config delete global_kill_switch" in error["Remedy"]) == ("global_kill_switch is on", True)
    installed("config", "delete", "global_kill_switch")
    installed("config", "put", "condition_battery_percent", "7")
    assert "digits: conditions: battery 7 %, below 30 %" in refused(installed, "run-now", "digits")["Error"]
    installed("consent", "revoke")
    error = refused(installed, "run-now", "digits")
    assert "deleted: measurement consent is revoked" in error["Error"]
    assert "schedule it again" in error["Remedy"]


# Flags and consent


def test_a_flag_is_put_shown_and_deleted(device):
    assert device("config", "get", "task_limit_per_package") == "50\n"
    assert device("config", "put", "task_limit_per_package", "7") == "task_limit_per_package 7\n"
    assert device("config", "get", "task_limit_per_package") == "7\n"
    assert "* task_limit_per_package = 7\n" in device("config", "list", "--changed")
    assert printed(device("config", "list", "--changed", "--json")) == {"task_limit_per_package": 7}
    every = printed(device("config", "list", "--json"))
    assert (every["global_kill_switch"], every["transient_error_retry_delay_jitter_percent"]) == (False, 0.2)
    assert "(no effect: " in device("config", "list")
    assert "default" in device("config", "delete", "task_limit_per_package")
    assert device("config", "list", "--changed") == ""


@pytest.mark.parametrize(("command", "value"), [("put", ["true"]), ("get", []), ("delete", [])])
def test_an_unknown_flag_is_refused_with_a_suggestion(device, command, value):
    error = refused(device, "config", command, "condition_idel", *value)
    assert (error["Error"], error["Remedy"]) == ("there is no flag 'condition_idel'", "did you mean condition_idle?")


def test_a_value_that_a_flag_cannot_have_is_refused(device):
    assert "is no integer" in refused(device, "config", "put", "task_limit_per_package", "many")["Error"]
    assert "is none of auto, true, false" in refused(device, "config", "put", "condition_idle", "maybe")["Error"]


def test_consent_is_shown_revoked_and_given(device):
    assert printed(device("consent", "show", "--json")) == {
        "measurement": True, "protected_audience": True, "wipe": None,
    }  # fmt: skip
    assert device("consent", "revoke", "measurement") == "measurement: revoked\n"
    shown = device("consent", "show")
    assert "measurement          revoked\nprotected_audience   given\n" in shown
    assert "the user's data goes at 20" in shown
    assert printed(device("consent", "show", "--json"))["wipe"] > time.time() * 1000
    assert device("consent", "give") == "measurement and protected_audience: given\n"
    assert "goes" not in device("consent", "show")


def test_isolation_is_tried_and_told(fedcompute):
    enforced = all(one.enforced for one in probe())
    result = fedcompute("device", "isolation", "--json")
    assert result.exit_code == (0 if enforced else 1)
    assert {one["name"]: one["enforced"] for one in json.loads(result.output)} == {
        one.name: one.enforced for one in probe()
    }
    assert "network" in fedcompute("device", "isolation").output


# Directories


@pytest.mark.parametrize("arguments", [["status"], ["apps"], ["logs"], ["config", "list"], ["consent", "show"]])
def test_a_directory_that_is_none_is_a_readable_error(device, tmp_path, arguments):
    (tmp_path / "file").write_text("")
    error = refused(device, *arguments, "--device-dir", tmp_path / "file")
    assert (str(tmp_path / "file") in error["Error"], error["Code"]) == (True, "storage_failed")
    (tmp_path / "device.db").write_text("not one\n" * 1000)
    assert "not a database" in refused(device, *arguments, "--device-dir", tmp_path)["Error"]


# Processes


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
    wait_until(lambda: len(printed(installed("status", "--json"))["background_jobs"]) == 4)
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
    (row,) = printed(installed("download", "--json"))
    assert (row["outcome"], row["detail"]) == ("discarded", "sync token 3600 is not above 3600, the stored one")
    installed("schedule", "digits", "--every", "1m")
    running = start("fedcompute", "device", "run")
    lines_of(running)
    assert "digits: no_active_task_exists" in refused(installed, "run-now", "digits")["Error"]
    vendor.publish(7200, greeting="hello", other="word")
    assert "  ok  2 values came, remote data has 2 now" in installed("download")
    installed("config", "put", "condition_unmetered", "false")
    assert "the running device waits: metered network" in refused(installed, "download")["Error"]
    installed("config", "put", "global_kill_switch", "true")
    assert refused(installed, "run-now", "digits")["Error"] == "global_kill_switch is on"
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
