"""Paths and file URIs of this machine."""

from pathlib import Path
from urllib.parse import unquote, urlsplit


def local_path(uri: str) -> Path | None:
    """The path of `/a/b` or `file:///a/b`; None for a relative path, another scheme or another host."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        path = Path(unquote(parts.path))
    elif not parts.scheme:
        path = Path(uri)
    else:
        return None
    return path if path.is_absolute() and "\0" not in str(path) else None
