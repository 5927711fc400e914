"""How a developer's code reaches what lies outside its process: one question, one answer (spec/device.md 7.1)."""

from collections.abc import Callable
from typing import Any, NewType

from fedcompute.device.developer.errors import Status

Ask = Callable[[str, tuple[Any, ...], Any], Any]
"""`ask(method, arguments, type of the answer)`; raises `Refused`."""

RequestToken = NewType("RequestToken", Ask)  # type: ignore[valid-newtype]
"""Stands for one operation; opaque to developers. A service turns it into facilities, which end with the operation."""


class Refused(Exception):
    """A facility's no: the operation does not have it, or the data cannot be reached."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(f"{detail} [{status.name.lower()}]")
        self.status = status
        self.detail = detail
