"""Uploads that the engine has not collected yet, and how many of them are worth a look."""

import threading
from collections.abc import Collection, Iterable


class Uploads:
    """Sessions whose upload has been seen in the store and is not collected yet. A hint, rebuilt after a restart.

    A look at a round costs as much as taking an upload, so each round says how many uploads change anything for it.
    What comes before that is found by the pass that comes once a second. Rounds go by the folder of their uploads.
    """

    def __init__(self, *, alone: bool = True) -> None:
        """`alone`: all uploads come here; where other servers take some, no one knows when there are enough."""
        self._alone = alone
        self._lock = threading.Lock()
        self._folders: dict[str, str] = {}  # session -> folder
        self._wanted: dict[str, int] = {}
        self._came: dict[str, int] = {}  # since the engine last said how many it wants

    def add(self, session_id: str, folder: str) -> bool:
        """Notes an upload; returns whether its round has as many as it waits for, by default one."""
        with self._lock:
            self._folders[session_id] = folder
            self._came[folder] = self._came.get(folder, 0) + 1
            return self._came[folder] >= self._wanted.get(folder, 1)

    def wait_for(self, folder: str, count: int, seen: Collection[str]) -> bool:
        """Says that a round waits for `count` uploads beside those `seen`; returns whether they have come meanwhile."""
        with self._lock:
            came = sum(where == folder and one not in seen for one, where in self._folders.items())
            self._wanted[folder], self._came[folder] = count if self._alone else 1, came
            return came >= count

    def discard(self, session_ids: Iterable[str]) -> None:
        """Forgets sessions, which are collected or over."""
        with self._lock:
            for one in session_ids:
                self._folders.pop(one, None)

    def retain(self, folders: Collection[str]) -> None:
        """Forgets what other rounds wait for."""
        with self._lock:
            for known in (self._wanted, self._came):
                for folder in known.keys() - set(folders):
                    del known[folder]

    def among(self, session_ids: list[str]) -> list[str]:
        """Returns those of `session_ids` that are here, in their order."""
        with self._lock:
            return [one for one in session_ids if one in self._folders]

    def all(self) -> set[str]:
        """Returns every session here."""
        with self._lock:
            return set(self._folders)
