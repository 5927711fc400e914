"""The program's face: help at once, examples everywhere, refusals as blocks."""

import resource

import pytest

from fedcompute.errors import OperationFailed, Reason

COMMANDS = [
    "server", "task build", "task list", "task show", "task watch", "task pause", "task resume",
    "task cancel", "metrics plot", "metrics table",
    "model export", "privacy epsilon", "privacy noise", "privacy report", "fleet run", "quickstart",
    "enrolment create", "enrolment list", "enrolment revoke", "api-key create", "api-key list", "api-key revoke",
    "task clone", "task progress", "task artifacts", "keys list", "keys rotate", "secret check", "secret rotate",
    "backup", "restore", "doctor", "retention run", "audit log", "privacy verify", "privacy budget",
]  # fmt: skip
PRINTING = [command for command in COMMANDS if command != "quickstart"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(fedcompute, command):
    result = fedcompute(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: fedcompute {command}" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", PRINTING)
def test_every_command_that_prints_data_prints_it_for_programs_too(fedcompute, command):
    assert "--json" in fedcompute(*command.split(), "--help").output


def test_help_lists_every_command_in_less_than_half_a_second(program):
    seconds = []
    for _ in range(3):
        # Of processor time: what a machine without other work takes.
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = program("fedcompute", "--help")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert result.returncode == 0
    assert all(f" {command.split()[0]} " in result.stdout for command in COMMANDS)
    assert min(seconds) < 0.5, seconds


def test_the_version_is_printed(fedcompute):
    assert fedcompute("--version").output.startswith("fedcompute 0.")


def test_a_wrong_command_or_option_is_a_usage_error_without_a_traceback(program):
    for arguments in (["taks"], ["task", "list", "--nope"], ["privacy", "epsilon", "--noise-multiplier", "x"]):
        result = program("fedcompute", *arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_a_typed_error_is_one_block_on_stderr_and_exit_code_1(program):
    result = program("fedcompute", "task", "list", "--server", "http://localhost:1")
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Error", "Code", "Remedy"]
    assert lines[1].endswith("server_unreachable")


def test_a_file_that_cannot_be_opened_is_a_block_too(program, tmp_path):
    result = program("fedcompute", "task", "build", "--model", tmp_path, "--config", tmp_path / "missing.pbtxt")
    assert result.returncode == 1
    assert "missing.pbtxt" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_lines_of_a_long_error_stay_one_block(capsys):
    from fedcompute.cli.errors import show_error

    show_error(OperationFailed(Reason.SETTINGS_INVALID, "first\nsecond"))
    assert capsys.readouterr().err.splitlines()[1] == "        second"


def test_help_is_set_to_the_terminal_and_completion_is_the_programs_own(fedcompute, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # In the docstring the sentence goes on in a line of its own.
    assert "are read from its database." in fedcompute("audit", "log", "--help").output
    assert "--install-completion" not in fedcompute("audit", "--help").output
    assert "--install-completion" in fedcompute("--help").output
