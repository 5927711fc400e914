"""Private folders for the files through which a graph reads and writes; none outlives the process that made it."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "fedcompute-graph-"
_NEW_PREFIX = f".{_PREFIX}"
_LOCK = "lock"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """An empty folder that only this user may enter, gone at the end.

    A process that is killed leaves its folder behind, with one device's update in it: the next call, of any process
    of this user, removes it. The owner of a folder holds a lock in it, which ends with the process.
    """
    root = Path(tempfile.gettempdir())
    _sweep(root)
    # Under its name only once it is locked, so that nobody takes it for one that was left behind.
    made = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=root))
    lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    folder = made
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = made.rename(root / f"{_PREFIX}{made.name.removeprefix(_NEW_PREFIX)}")
        inner = folder / "files"
        inner.mkdir(mode=0o700)
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.geteuid() or folder.is_symlink():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
