"""Folders that an isolated process may write, and their end."""

import itertools
from pathlib import Path


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, however deep and whatever its modes; no link is followed.

    What lies two levels down is moved up before it is looked at, so that neither the length of a path nor the depth
    of a recursion sets a limit to what can be removed. Raises OSError.
    """
    numbers = itertools.count()
    while inner := [path for path in folder.iterdir() if not _removed(path)]:
        for directory in inner:
            directory.chmod(0o700)
            for path in list(directory.iterdir()):
                if not _removed(path):
                    # To move a directory is to write in it.
                    path.chmod(0o700)
                    path.rename(next(free for number in numbers if not (free := folder / str(number)).exists()))
            directory.rmdir()
    folder.rmdir()


def _removed(path: Path) -> bool:
    """Removes what is no directory."""
    if path.is_dir() and not path.is_symlink():
        return False
    path.unlink()
    return True
