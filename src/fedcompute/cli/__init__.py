"""The `fedcompute` program. A command's module is imported when the command runs, so that help answers at once."""

import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fedcompute import __version__
from fedcompute.cli.errors import typed_errors

_EXAMPLE = "Example: fedcompute quickstart"
_LINE_END = re.compile(r"(?<!\n)\n(?!\n)")


@dataclass(frozen=True)
class _Entry:
    """Where a command lives: `attribute` of `module` is a Typer app, or a function that becomes one command."""

    module: str
    attribute: str
    help: str


_COMMANDS = {
    "quickstart": _Entry(
        "fedcompute.cli.quickstart", "quickstart", "Train a model on simulated devices, end to end, in a few minutes."
    ),
    "server": _Entry("fedcompute.cli.server", "app", "Run a federated compute server."),
    "task": _Entry("fedcompute.cli.task", "app", "Build, list, show, watch, cancel and clone tasks."),
    "api-key": _Entry("fedcompute.cli.api_keys", "app", "Make, list and revoke API keys for operators."),
    "keys": _Entry("fedcompute.cli.keys", "app", "List and rotate the encryption keys that devices use."),
    "secret": _Entry("fedcompute.cli.secret", "app", "Replace the operator secret, which seals keys and secrets."),
    "backup": _Entry("fedcompute.cli.backup", "backup_app", "Copy a server's database and objects into a folder."),
    "restore": _Entry("fedcompute.cli.backup", "restore_app", "Fill an empty server from a backup, or check one."),
    "doctor": _Entry("fedcompute.cli.doctor", "doctor", "Find what is stuck or inconsistent, and say what to do."),
    "retention": _Entry("fedcompute.cli.retention", "app", "Remove what is old now, or show what is due."),
    "audit": _Entry("fedcompute.cli.audit", "app", "Show what operators have changed or tried to change."),
    "enrolment": _Entry("fedcompute.cli.enrolments", "app", "Enrol devices that prove themselves with a secret."),
    "device": _Entry("fedcompute.cli.device", "app", "Run this machine as a device: apps, tasks, isolation, logs."),
    "fleet": _Entry("fedcompute.cli.fleet", "fleet", "Run many simulated devices against a server."),
    "simulate": _Entry("fedcompute.cli.simulate", "simulate", "Run a task's rounds in memory, or sweep over settings."),
    "metrics": _Entry("fedcompute.cli.metrics", "app", "Plot a task's metrics, or print them as a table."),
    "model": _Entry("fedcompute.cli.model", "app", "Export a round's weights into your model."),
    "privacy": _Entry("fedcompute.cli.privacy", "app", "Epsilon, noise, reports, ledgers, budgets and audits."),
}


# Commands of one function whose name alone is no example.
_EXAMPLES = {
    "simulate": "simulate task_config.pbtxt --model digits-linear --clients 100 --rounds 50 --sweep clip_norm=0.1,1",
}


class _Commands(TyperGroup):
    """The top level: names and one-line helps from the table, modules on demand, typed errors as readable blocks."""

    _listing = False

    # Typer brings its own copy of click in some versions, so the library's own types cannot be named here.
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        entry = _COMMANDS[cmd_name]
        if self._listing:
            return TyperCommand(cmd_name, help=entry.help)
        return _load(cmd_name, entry)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def invoke(self, ctx: Any) -> Any:
        with typed_errors():
            return super().invoke(ctx)


def _load(name: str, entry: _Entry) -> Any:
    found: typer.Typer | Callable[..., Any] = getattr(importlib.import_module(entry.module), entry.attribute)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False)
        found.command(name, epilog=f"Example: fedcompute {_EXAMPLES.get(name, name)}")(function)
    command = typer.main.get_command(found)
    command.name = name
    # Completion is the program's, not that of a part of it.
    command.params = [one for one in command.params if one.name not in ("install_completion", "show_completion")]
    for one in (command, *getattr(command, "commands", {}).values()):
        # Where a docstring's lines end means nothing on a terminal of another width.
        one.help = _LINE_END.sub(" ", one.help or "")
    return command


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, epilog=_EXAMPLE)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedcompute {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Self-hosted federated compute: build tasks, serve devices, watch models learn."""


def main() -> None:
    """Entry point of the `fedcompute` program."""
    # Worker processes inherit it, and TensorFlow reads it when they load it: its converter is talkative.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app()
