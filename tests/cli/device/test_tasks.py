"""Tasks are scheduled, shown, run and cancelled."""

import json

import pytest


def test_a_task_is_scheduled_shown_and_cancelled(installed):
    assert "no tasks; schedule one" in installed("status")
    assert "digits: next run 20" in installed("schedule", "digits")
    task = json.loads(installed("schedule", "letters", "--every", "12h", "--json"))
    assert (task["population"], task["recurrent"], task["minimum_interval"]) == ("letters", True, 43_200_000)
    shown = installed("status")
    assert "digits  once, job " in shown
    assert "letters  every 43200 s, job " in shown
    assert "not running; start `fedcompute device run`" in shown
    document = json.loads(installed("status", "--json"))
    assert (document["running"], [one["population"] for one in document["tasks"]]) == (False, ["digits", "letters"])
    assert installed("cancel", "digits") == "digits is cancelled\n"
    assert installed("cancel", "digits") == "digits was not scheduled\n"
    assert [one["population"] for one in json.loads(installed("status", "--json"))["tasks"]] == ["letters"]


def test_status_says_what_tasks_wait_for(installed):
    installed("config", "put", "condition_idle", "false")
    installed("config", "put", "condition_battery_percent", "7")
    installed("config", "put", "federated_compute_kill_switch", "true")
    shown = installed("status")
    for words in ("not idle", "battery 7 %, below 30 %", "federated_compute_kill_switch is on"):
        assert words in shown
    assert "not idle" in json.loads(installed("status", "--json"))["waits_for"]


@pytest.mark.parametrize("every", ["0s", "12", "h", "-1h", "1.5h", "9" * 12 + "d", "1 h", "1w", ""])
def test_a_length_of_time_that_is_none_is_refused(installed, every):
    error = installed.refused("schedule", "digits", f"--every={every}")
    assert "is no length of time" in error["Error"]
    assert "12h" in error["Remedy"]


@pytest.mark.parametrize("population", ["", " ", "a/b", "a?b", "a\x1b[31m"])
def test_a_population_that_no_url_can_hold_is_refused(installed, population):
    assert "is no name of a population" in installed.refused("schedule", population)["Error"]


def test_a_task_that_is_refused_says_why(installed, write_app):
    installed("consent", "revoke", "measurement")
    assert "measurement consent is revoked" in installed.refused("schedule", "digits")["Error"]
    installed("consent", "give")
    installed("install", write_app(server=None))
    assert "the manifest names no server" in installed.refused("schedule", "digits")["Error"]


def test_a_task_runs_now_without_a_running_device(installed, write_app, server):
    installed("install", write_app(server=server.url))
    assert installed.refused("run-now", "digits")["Error"] == "digits is not scheduled"
    installed("schedule", "digits")
    error = installed.refused("run-now", "digits")
    assert error["Error"].startswith("digits: no_active_task_exists: ")
    assert error["Code"] == "run_failed"
    answer = json.loads(installed("run-now", "digits", "--json", code=1))
    assert (answer["population"], answer["outcome"]) == ("digits", "no_active_task_exists")
    assert "next in" in answer["detail"]


def test_a_task_that_cannot_run_now_is_not_waited_for(installed):
    installed("schedule", "digits")
    installed("config", "put", "global_kill_switch", "true")
    error = installed.refused("run-now", "digits")
    assert (error["Error"], "config delete global_kill_switch" in error["Remedy"]) == ("global_kill_switch is on", True)
    installed("config", "delete", "global_kill_switch")
    installed("config", "put", "condition_battery_percent", "7")
    assert "digits: conditions: battery 7 %, below 30 %" in installed.refused("run-now", "digits")["Error"]
    installed("consent", "revoke")
    error = installed.refused("run-now", "digits")
    assert "deleted: measurement consent is revoked" in error["Error"]
    assert "schedule it again" in error["Remedy"]
