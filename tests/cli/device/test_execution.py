"""`fedcompute device execute`, with real services in isolation."""

import json

import pytest

SERVICE = "org.example.app/org.example.app.Service"


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
    answer = json.loads(installed("execute", "--param", "show=1", "--render", "1x2", "--json"))
    assert answer == {"service": SERVICE, "has_surface": True, "html": "<p>1 2</p>"}


def test_a_service_that_fails_is_an_error_that_leads_to_its_traceback(installed, isolated):
    error = installed.refused("execute", "--param", "fail=of the user")
    assert (error["Error"], error["Code"]) == ("the service failed [isolated_service_failed]", "worker_failed")
    assert "fedcompute device logs" in error["Remedy"]
    assert "KeyError: 'of the user'" in installed("logs")


def test_a_caller_that_the_list_excludes_gets_an_error(installed):
    installed("config", "put", "caller_app_allow_list", "org.example.other")
    assert "caller_app_allow_list" in installed.refused("execute", "--caller", "org.example.caller")["Error"]


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
    error = installed.refused("execute", f"{option}={text}")
    assert (error["Error"].split(":")[0], error["Code"]) == (f"{option} {text}", "settings_invalid")
