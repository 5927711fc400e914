"""`fedcompute server --android`: commands that fit the server, and none that phones would refuse."""

import json
import shlex
import urllib.request

import pytest

from fedcompute.cli.android import SAMPLE_PACKAGE, adb_commands, phone_lines
from fedcompute.errors import OperationFailed, Reason

KEYS = "/.well-known/odp/v1/public-keys"


def commands(base_url, *, encryption=True):
    return adb_commands(base_url, base_url + KEYS, encryption=encryption)


def flags(lines):
    words = [shlex.split(line) for line in lines]
    return {one[5]: one[6] for one in words if one[2:5] == ["device_config", "put", "on_device_personalization"]}


def properties(lines):
    words = [shlex.split(line) for line in lines]
    return {one[3]: one[4] for one in words if one[2] == "setprop"}


def test_every_flag_that_keeps_a_phone_from_training_is_set_after_the_sync_is_off():
    lines = commands("http://localhost:8080")
    assert lines[1] == "adb shell device_config set_sync_disabled_for_tests persistent"
    assert flags(lines) == {
        "global_kill_switch": "false",
        "federated_compute_kill_switch": "false",
        "enable_ondevicepersonalization_apis": "true",
        "enable_personalization_status_override": "true",
        "personalization_status_override_value": "true",
        "caller_app_allow_list": SAMPLE_PACKAGE,
        "isolated_service_allow_list": SAMPLE_PACKAGE,
        "fcp_enable_client_error_logging": "true",
        "odp_enable_client_error_logging": "true",
        "example_store_service_timeout_sec": "30",
        "fcp_encryption_key_download_url": f"http://localhost:8080{KEYS}",
        "fcp_enable_encryption": "true",
    }


def test_the_sample_is_sent_to_this_server():
    set_ = properties(commands("https://fc.example.org"))
    assert set_["debug.ondevicepersonalization.override_fc_server_url_package"] == SAMPLE_PACKAGE
    assert set_["debug.ondevicepersonalization.override_fc_server_url"] == "https://fc.example.org"


def test_plaintext_needs_a_server_that_takes_it_and_still_a_key_url():
    set_ = flags(commands("https://fc.example.org", encryption=False))
    assert set_["fcp_enable_encryption"] == "false"
    assert set_["fcp_encryption_key_download_url"] == f"https://fc.example.org{KEYS}"


@pytest.mark.parametrize(
    ("base_url", "reverse"),
    [
        ("http://localhost:8080", ["adb reverse tcp:8080 tcp:8080"]),
        ("http://localhost:80/fc", ["adb reverse tcp:80 tcp:80"]),
        ("https://localhost:8443", ["adb reverse tcp:8443 tcp:8443"]),
        ("https://localhost", ["adb reverse tcp:443 tcp:443"]),
        ("https://fc.example.org:8443", []),
        ("https://fc.example.org/fc", []),
    ],
)
def test_localhost_of_the_phone_leads_here_and_other_hosts_are_found_without(base_url, reverse):
    assert [line for line in commands(base_url) if line.startswith("adb reverse")] == reverse


@pytest.mark.parametrize(
    "base_url",
    [
        "http://127.0.0.1:8080",
        "http://192.168.0.2:8080",
        "http://fc.example.org",
        "http://localhost",
        "http://localhost:",
        "http://localhost:x",
        "http://localhost:99999",
        "https://[",
        "HTTP://LOCALHOST:80",
        "",
    ],
)
def test_a_url_that_phones_refuse_is_no_command_but_an_error_that_says_what_they_take(base_url):
    with pytest.raises(OperationFailed, match=r"they take https://, and http://localhost:PORT") as caught:
        commands(base_url)
    assert caught.value.reason is Reason.SETTINGS_INVALID
    assert "--public-url" in caught.value.remedy


def test_a_url_with_signs_of_the_shell_reaches_the_phone_as_it_is():
    url = "https://fc.example.org/it's&more;$HOME"
    (line,) = [one for one in commands(url) if one.startswith("adb shell") and "override_fc_server_url " in one]
    here = shlex.split(line)
    assert here[:2] == ["adb", "shell"]
    assert len(here) == 3
    assert shlex.split(here[2])[2] == url


def test_people_are_told_whose_package_the_commands_name_and_nothing_without_commands():
    assert phone_lines([]) == ""
    assert SAMPLE_PACKAGE in phone_lines(["adb"]).splitlines()[1]


def test_a_server_prints_the_commands_for_its_own_port(start, tmp_path):
    process = start("fedcompute", "server", "--data-dir", tmp_path / "data", "--port", 0, "--android", "--json")
    announced = json.loads(process.stdout.readline())
    assert announced["android"] == adb_commands(announced["url"], announced["key_url"], encryption=True)
    assert announced["android"][0].startswith("adb reverse tcp:")
    with urllib.request.urlopen(flags(announced["android"])["fcp_encryption_key_download_url"], timeout=30) as answer:
        assert json.load(answer)["keys"]


def test_a_server_that_takes_plaintext_says_so_to_people_and_keeps_quiet_without_the_flag(start, tmp_path):
    options = ("--data-dir", tmp_path / "data", "--port", 0, "--public-url", "https://fc.example.org/")
    process = start("fedcompute", "server", *options, "--allow-plaintext-uploads", "--android")
    expected = adb_commands("https://fc.example.org", f"https://fc.example.org{KEYS}", encryption=False)
    while SAMPLE_PACKAGE not in process.stdout.readline():
        assert process.poll() is None
    assert [process.stdout.readline().rstrip("\n") for _ in expected] == expected
    plain = start("fedcompute", "server", "--data-dir", tmp_path / "other", "--port", 0, "--json")
    assert "android" not in json.loads(plain.stdout.readline())


def test_a_public_url_that_phones_refuse_ends_the_start(program, tmp_path):
    arguments = ("--data-dir", tmp_path / "data", "--port", 0, "--public-url", "http://10.0.0.5:8080", "--android")
    result = program("fedcompute", "server", *arguments)
    assert result.returncode == 1
    assert "devices accept https:// and http://localhost:<port> only" in result.stderr
