"""Files that appear under their name when they are whole, written as their bytes come."""

import asyncio
import contextlib
import os
import secrets
import threading
from collections.abc import AsyncIterable
from pathlib import Path

PART_BYTES = 256 << 10  # hundreds of slow uploads lie in memory at once
_NAMES = 10**12
_ATTEMPTS = 3  # to open a file whose folder somebody removes at the same time


async def write_staged(place: Path, chunks: AsyncIterable[bytes], *, patience: float) -> None:
    """Writes a file from chunks, about `PART_BYTES` at a time in threads, and puts it in the place of an older one.

    Nothing is left if the chunks raise or the caller is canceled; a disk that hangs keeps it for `patience` seconds
    then. Raises OSError.
    """
    loop = asyncio.get_running_loop()
    staged = _StagedFile(place)
    part = bytearray()
    try:
        async for chunk in chunks:
            part += chunk
            if len(part) >= PART_BYTES:
                await loop.run_in_executor(None, staged.write, part)
                # Not cleared: a write whose caller was canceled may still look at it.
                part = bytearray()
        await loop.run_in_executor(None, staged.finish, part)
    except BaseException:
        await asyncio.wait([loop.run_in_executor(None, staged.discard)], timeout=patience)
        raise


class _StagedFile:
    """Methods block, and wait for each other: one may be called while another has not returned."""

    def __init__(self, place: Path) -> None:
        self._place = place
        # The form of the store library's own unfinished files, which it leaves out of every list.
        self._path = place.with_name(f"{place.name}#{secrets.randbelow(_NAMES)}")
        self._lock = threading.Lock()
        self._file: int | None = None
        self._over = False

    def write(self, data: bytearray) -> None:
        with self._lock:
            self._write(data)

    def finish(self, data: bytearray) -> None:
        with self._lock:
            self._write(data)
            if not self._over:
                self._close()
                self._path.replace(self._place)

    def discard(self) -> None:
        """Leaves nothing; what is written later is dropped."""
        with self._lock:
            self._close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def _write(self, data: bytearray) -> None:
        if self._over:
            return
        if self._file is None:
            self._file = self._open()
        with memoryview(data) as left:
            at = 0
            while at < len(left):
                at += os.write(self._file, left[at:])

    def _open(self) -> int:
        for attempt in range(_ATTEMPTS):
            try:
                return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._place.parent.mkdir(parents=True, exist_ok=True)
        raise AssertionError("the last attempt returns or raises")

    def _close(self) -> None:
        self._over = True
        if self._file is not None:
            os.close(self._file)
            self._file = None
