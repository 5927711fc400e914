"""Certificates that are no longer trusted: a JSON file that may change at any time (spec/server.md 3.4)."""

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography import x509

from fedcompute.errors import OperationFailed, Reason

_LOG = logging.getLogger(__name__)
_FILE_LIMIT = 64 * 1024 * 1024


class RevocationList:
    """The file `{"entries": {serial in hex: {...}}}`, read again whenever it changes; safe for threads.

    Raises OperationFailed(SETTINGS_INVALID) at construction if it cannot be read. A later file that cannot be read is
    logged once, and the last good list stays in force.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._state = self._look()
        self._serials = self._read()

    def holds(self, chain: Iterable[x509.Certificate]) -> bool:
        """Whether any certificate of the chain is on the list, whatever its entry says.

        Formal guarantees: decides by the newest readable state of the file at the time of the call.
        """
        serials = self._current()
        return any(f"{one.serial_number:x}" in serials for one in chain)

    def _current(self) -> frozenset[str]:
        with self._lock:
            state = self._look()
            if state != self._state:
                self._state = state
                try:
                    self._serials = self._read()
                except OperationFailed as error:
                    _LOG.error("the last list of revoked certificates stays in force: %s", error)
            return self._serials

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> frozenset[str]:
        try:
            with self._path.open("rb") as file:
                data = file.read(_FILE_LIMIT + 1)
            if len(data) > _FILE_LIMIT:
                raise ValueError(f"more than {_FILE_LIMIT} bytes")
            return _serials(json.loads(data))
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else "no JSON object with entries by serial number"
            detail = f"setting attestation_revocation_list: {why}"
            raise OperationFailed(Reason.SETTINGS_INVALID, detail) from None


def _serials(document: Any) -> frozenset[str]:
    entries = document.get("entries") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise ValueError("no entries")
    # Written as the list's authors do, or with capitals or leading zeros, it is the same number. Old entries of the
    # published list are decimal; which they are nothing says, so digits alone stand for both.
    found = {f"{int(serial, 16):x}" for serial in entries}
    return frozenset(found | {f"{int(serial):x}" for serial in entries if _is_decimal(serial)})


def _is_decimal(serial: str) -> bool:
    # No serial number has more than 20 bytes.
    return serial.isascii() and serial.isdecimal() and len(serial) <= 49
