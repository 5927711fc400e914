"""What the commands of `fedcompute device` share: the directory, isolation, services and times."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.errors import OperationFailed, Reason

if TYPE_CHECKING:
    from fedcompute.device.directory import DeviceDirectory
    from fedcompute.device.state.apps import App
    from fedcompute.device.state.database import Transaction

DEFAULT_DIRECTORY = Path("fedcompute-device")

DeviceDir = Annotated[
    Path,
    typer.Option(
        "--device-dir", help="Directory of the device, made when it is missing.", envvar="FEDCOMPUTE_DEVICE_DIR"
    ),
]
Service = Annotated[
    str | None,
    typer.Option(
        "--service", help="Class or package/class of an installed app's service.", show_default="the only one"
    ),
]


class Isolation(StrEnum):
    """What to do where the kernel enforces less than the whole isolation."""

    STRICT = "strict"
    REPORT = "report"


IsolationOption = Annotated[
    Isolation,
    typer.Option(
        "--isolation", help="strict: run nothing unless the kernel enforces all of it; report: tell and go on."
    ),
]

_DURATION = re.compile(r"([0-9]{1,12})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_CENTURY = 36_525 * 86_400


@contextmanager
def device_directory(path: Path) -> "Iterator[DeviceDirectory]":
    """The device's folder, closed at the end of the block."""
    from fedcompute.device.directory import DeviceDirectory

    directory = DeviceDirectory.open(path)
    try:
        yield directory
    finally:
        directory.close()


def chosen_app(tx: "Transaction", service: str | None) -> "App":
    """The installed app that `--service` names, or the only one.

    Raises OperationFailed (SETTINGS_INVALID) if there is none, or more than one could be meant.
    """
    from fedcompute.device.state.apps import list_apps

    apps = list_apps(tx)
    found = [one for one in apps if service in (None, one.owner.id, one.owner.class_name)]
    if len(found) == 1:
        return found[0]
    if not apps:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "no app is installed", remedy="install one with `fedcompute device install FOLDER`"
        )
    names = ", ".join(one.owner.id for one in found or apps)
    what = f"{service} is not installed" if service is not None and not found else "several services could be meant"
    raise OperationFailed(Reason.SETTINGS_INVALID, f"{what}: {names}", remedy="name one of these with --service")


def read_duration(text: str) -> timedelta:
    """`90s`, `30m`, `12h` or `7d`, up to a hundred years. Raises OperationFailed (SETTINGS_INVALID)."""
    match = _DURATION.fullmatch(text.strip())
    seconds = 0 if match is None else int(match[1]) * _UNITS[match[2]]
    if not 0 < seconds <= _CENTURY:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"{text[:80]!r} is no length of time", remedy="write it like 90s, 30m, 12h or 7d"
        )
    return timedelta(seconds=seconds)


def when(milliseconds: int) -> str:
    """A moment in local time, to the second; a dash for 0."""
    if milliseconds == 0:
        return "-"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
