"""Every command of `fedcompute device` explains itself."""

import pytest
import typer

from fedcompute.cli import device as device_commands


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
