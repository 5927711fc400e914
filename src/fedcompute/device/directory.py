"""The folder of one device: its file, the scratch folders of training, and who is running on it."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedcompute.device.isolation.scratch import remove_folder
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.errors import OperationFailed, Reason

_ASKING_SECONDS = 0.3


@dataclass(frozen=True)
class DeviceDirectory:
    """An open folder. `database`: the file `device.db` in it."""

    path: Path
    database: DeviceDatabase

    @classmethod
    def open(cls, path: Path) -> "DeviceDirectory":
        """Opens a device's folder, makes it for its owner only if it is not there.

        Raises OperationFailed (STORAGE_FAILED) if it cannot be used.
        """
        with _storage_errors(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(path.resolve(), DeviceDatabase(path.resolve() / "device.db"))

    @property
    def scratch(self) -> Path:
        """Where training processes have their folders."""
        return self.path / "scratch"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Runs tasks on this device, as one process at a time may; what a killed one left in `scratch` goes.

        Raises OperationFailed: DATA_IN_USE if another process does, STORAGE_FAILED if the folder cannot be written.
        """
        with _storage_errors(self.path):
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _locked(lock):
                raise OperationFailed(
                    Reason.DATA_IN_USE,
                    f"another process runs the device in {self.path}",
                    remedy="stop `fedcompute device run` there, or name another device directory",
                )
            with _storage_errors(self.path):
                _make_empty(self.scratch)
            yield
        finally:
            os.close(lock)

    def in_use(self) -> bool:
        """Whether a process runs tasks on this device."""
        try:
            lock = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def close(self) -> None:
        self.database.close()


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        detail = f"{error.filename or path}: {error.strerror or type(error).__name__}"
        raise OperationFailed(Reason.STORAGE_FAILED, detail, remedy="name another device directory") from error


def _locked(lock: int) -> bool:
    """Takes the lock; waits out those who only ask whether somebody has it."""
    deadline = time.monotonic() + _ASKING_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _make_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        remove_folder(folder)
    else:
        folder.unlink(missing_ok=True)
    folder.mkdir(mode=0o700)
