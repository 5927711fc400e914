"""`fedcompute server` as a process."""

import dataclasses
import json
import os
import signal
import socket
import tomllib
import urllib.request

import pytest

from fedcompute.server.configuration import flag_of
from fedcompute.server.listening import listen
from fedcompute.server.setting import about
from fedcompute.server.settings import Settings


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
    text = "".join(process.stdout.readline() for _ in range(7))
    for words in (
        "http://127.0.0.1:",
        "http://localhost:",
        "/.well-known/odp/v1/public-keys",
        "dashboard",
        str(tmp_path),
        "Ctrl-C",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retry-no-task", "5:x"], "--retry-no-task"),
        (["--retry-no-task", "5:1"], "retry_no_task"),
        (["--public-url", "http://example.org"], "public_url"),
        (["--log-level", "loud"], "log_level"),
        (["--port", "many"], "--port"),
        (["--port", "70000"], "--port"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--tls-certificate", "nowhere.crt", "--tls-key", "nowhere.key"], "nowhere.crt"),
        (["--tls-key", "nowhere.key"], "tls_certificate"),
        (["--roles", "engine"], "roles"),
        (["--roles", "api,builder"], "--roles"),
        (["--workers", "-1"], "workers"),
        (["--database-url", "nonsense"], "database URL"),
        (["--database-url", "sqlite:////proc/none.db"], "database"),
        (["--blob-url", "ftp://nowhere"], "blob store"),
        (["--blob-url", "http://nowhere.invalid/blobs"], "blob store"),
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


def test_a_flag_beats_the_environment_and_the_environment_the_file(program, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('workers = 3\nhost = "::1"\nport = 1\n')
    environment = {"FEDCOMPUTE_CONFIG": str(file), "FEDCOMPUTE_HOST": "::", "FEDCOMPUTE_PORT": "2"}
    result = program("fedcompute", "server", "--port", "3", "--show-config", "--json", env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    shown = {one["name"]: (one["value"], one["origin"]) for one in json.loads(result.stdout)}
    assert shown["workers"] == (3, str(file))
    assert shown["host"] == ("::", "FEDCOMPUTE_HOST")
    assert shown["port"] == (3, "--port")
    assert shown["job_attempts"] == (Settings.job_attempts, "default")


def test_what_show_config_prints_is_a_settings_file(program, tmp_path):
    arguments = ("--retry-no-task", "5:6", "--allow-plaintext-uploads", "--data-dir", tmp_path / 'a "quoted" name')
    first = program("fedcompute", "server", "--show-config", *arguments)
    assert first.returncode == 0, first.stderr
    file = tmp_path / "server.toml"
    file.write_text(first.stdout)
    second = program("fedcompute", "server", "--show-config", "--config", file)
    assert second.returncode == 0, second.stderr
    assert tomllib.loads(second.stdout) == tomllib.loads(first.stdout)
    assert tomllib.loads(first.stdout)["retry_no_task"] == [5.0, 6.0]


def test_help_lists_every_setting_with_its_words(program):
    shown = " ".join(program("fedcompute", "server", "--help", env=os.environ | {"COLUMNS": "250"}).stdout.split())
    for one in dataclasses.fields(Settings):
        assert f" {flag_of(one.name)} " in shown
        assert about(one).help in shown


def test_an_answer_does_not_wait_for_the_other_side_to_acknowledge_its_head():
    # Together with delayed acknowledgements that would be 40 ms for each request.
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
