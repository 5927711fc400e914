"""Flags, consent, what isolation is in force, and directories that are none."""

import json
import time

import pytest

from fedcompute.device.isolation.probe import probe


def test_a_flag_is_put_shown_and_deleted(device):
    assert device("config", "get", "task_limit_per_package") == "50\n"
    assert device("config", "put", "task_limit_per_package", "7") == "task_limit_per_package 7\n"
    assert device("config", "get", "task_limit_per_package") == "7\n"
    assert "* task_limit_per_package = 7\n" in device("config", "list", "--changed")
    assert json.loads(device("config", "list", "--changed", "--json")) == {"task_limit_per_package": 7}
    every = json.loads(device("config", "list", "--json"))
    assert (every["global_kill_switch"], every["transient_error_retry_delay_jitter_percent"]) == (False, 0.2)
    assert "(no effect: " in device("config", "list")
    assert "default" in device("config", "delete", "task_limit_per_package")
    assert device("config", "list", "--changed") == ""


@pytest.mark.parametrize(("command", "value"), [("put", ["true"]), ("get", []), ("delete", [])])
def test_an_unknown_flag_is_refused_with_a_suggestion(device, command, value):
    error = device.refused("config", command, "condition_idel", *value)
    assert (error["Error"], error["Remedy"]) == ("there is no flag 'condition_idel'", "did you mean condition_idle?")


def test_a_value_that_a_flag_cannot_have_is_refused(device):
    assert "is no integer" in device.refused("config", "put", "task_limit_per_package", "many")["Error"]
    assert "is none of auto, true, false" in device.refused("config", "put", "condition_idle", "maybe")["Error"]


def test_consent_is_shown_revoked_and_given(device):
    assert json.loads(device("consent", "show", "--json")) == {
        "measurement": True, "protected_audience": True, "wipe": None,
    }  # fmt: skip
    assert device("consent", "revoke", "measurement") == "measurement: revoked\n"
    shown = device("consent", "show")
    assert "measurement          revoked\nprotected_audience   given\n" in shown
    assert "the user's data goes at 20" in shown
    assert json.loads(device("consent", "show", "--json"))["wipe"] > time.time() * 1000
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


@pytest.mark.parametrize("arguments", [["status"], ["apps"], ["logs"], ["config", "list"], ["consent", "show"]])
def test_a_directory_that_is_none_is_a_readable_error(device, tmp_path, arguments):
    (tmp_path / "file").write_text("")
    error = device.refused(*arguments, "--device-dir", tmp_path / "file")
    assert (str(tmp_path / "file") in error["Error"], error["Code"]) == (True, "storage_failed")
    (tmp_path / "device.db").write_text("not one\n" * 1000)
    assert "not a database" in device.refused(*arguments, "--device-dir", tmp_path)["Error"]
