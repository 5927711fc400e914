"""`fedcompute server` as a process."""

import json
import signal
import socket
import urllib.request

import pytest

from fedcompute.cli.server import read_window
from fedcompute.errors import FedComputeError
from fedcompute.server.settings import RetryWindow, Settings


def test_the_server_says_where_it_is_answers_there_and_stops_with_ctrl_c(start, tmp_path):
    process = start("fedcompute", "server", "--data-dir", tmp_path / "data", "--port", 0, "--json")
    announced = json.loads(process.stdout.readline())
    with urllib.request.urlopen(announced["key_url"], timeout=30) as answer:
        assert json.load(answer)["keys"]
    with urllib.request.urlopen(announced["listening"] + "/ready", timeout=30) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    assert (tmp_path / "data" / "blobs").is_dir()


def test_people_are_told_address_keys_data_and_how_to_stop(start, tmp_path):
    process = start("fedcompute", "server", "--data-dir", tmp_path / "data", "--port", 0)
    text = "".join(process.stdout.readline() for _ in range(6))
    for words in ("http://127.0.0.1:", "http://localhost:", "/.well-known/odp/v1/public-keys", str(tmp_path), "Ctrl-C"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retry-no-task", "5:x"], "--retry-no-task"),
        (["--retry-no-task", "5:1"], "retry_no_task"),
        (["--public-url", "http://example.org"], "public_url"),
        (["--log-level", "loud"], "--log-level"),
        (["--workers", "-1"], "workers"),
        (["--database-url", "nonsense"], "database URL"),
        (["--database-url", "sqlite:////proc/none.db"], "database"),
        (["--blob-url", "ftp://nowhere"], "blob store"),
        (["--host", "192.0.2.1"], "cannot listen"),
    ],
)
def test_a_wrong_setting_is_a_block_and_no_server(program, tmp_path, arguments, words):
    result = program("fedcompute", "server", "--data-dir", tmp_path, "--port", 0, *arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert result.stderr.startswith("Error:")
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_named(program, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = program("fedcompute", "server", "--data-dir", tmp_path / "data", "--port", port)
    assert result.returncode == 1
    assert f"127.0.0.1:{port}" in result.stderr
    assert not (tmp_path / "data").exists()


def test_a_second_server_on_the_same_data_is_refused_and_the_first_goes_on(start, program, tmp_path):
    data = tmp_path / "data"
    first = start("fedcompute", "server", "--data-dir", data, "--port", 0, "--json")
    announced = json.loads(first.stdout.readline())
    second = program("fedcompute", "server", "--data-dir", data, "--port", 0)
    assert second.returncode == 1
    assert "data_in_use" in second.stderr
    assert f"process {first.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    with urllib.request.urlopen(announced["listening"] + "/ready", timeout=30) as answer:
        assert answer.status == 200
    first.kill()
    first.wait()
    third = start("fedcompute", "server", "--data-dir", data, "--port", 0, "--json")
    assert json.loads(third.stdout.readline())["data_dir"] == str(data)


def test_every_setting_is_an_option_with_the_setting_s_default(fedcompute):
    import dataclasses
    import inspect

    from fedcompute.cli.server import server

    parameters = inspect.signature(server).parameters
    for field in dataclasses.fields(Settings):
        assert field.name in parameters
        default = parameters[field.name].default
        if isinstance(field.default, RetryWindow):
            default = read_window(field.name, default)
        if field.default is not dataclasses.MISSING:
            assert default == field.default


def test_one_number_is_a_window_of_its_own():
    assert read_window("--retry-no-task", "2") == RetryWindow(2, 2)
    with pytest.raises(FedComputeError):
        read_window("--retry-no-task", "")
