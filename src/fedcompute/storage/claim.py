"""The claim of one server on its database file: two round engines on one file would do every job twice."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from fedcompute.errors import OperationFailed, Reason

_PID_BYTES = 20


class Claim:
    """A file's lock, held until `close` or the end of the process, whatever ends it. Use as a context manager.

    Formal guarantees: of all processes of one machine that claim the same path at most one holds the claim; the kernel
    gives it back when the process is gone, so `kill -9` leaves nothing to clean up.
    """

    def __init__(self, path: Path) -> None:
        """Claims `path`, a file of its own that is made if missing and stays.

        Raises OperationFailed: DATA_IN_USE if another server has it, STORAGE_FAILED if the file system cannot lock.
        """
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OperationFailed(
                Reason.STORAGE_FAILED, f"the database in {path.parent} cannot be claimed: {error.strerror}"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, _PID_BYTES, 0).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            process = f" (process {holder})" if holder.isdecimal() else ""
            raise OperationFailed(
                Reason.DATA_IN_USE, f"another server{process} works on the data in {path.parent}"
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise OperationFailed(
                Reason.STORAGE_FAILED, f"the database in {path.parent} cannot be locked: {error.strerror}"
            ) from error
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            # The number is for people only; a full disk must not keep a server from starting.
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the claim back; the file stays, since removing it would let two claim two files of one name."""
        os.close(self._descriptor)
