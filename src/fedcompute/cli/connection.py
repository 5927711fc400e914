"""How commands reach a server's management API: its URL, and the API key from a file or the environment."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from fedcompute.errors import OperationFailed, Reason

if TYPE_CHECKING:
    from fedcompute.monitoring.operator_api import OperatorApi

KEY_VARIABLE = "FEDCOMPUTE_API_KEY"
_FILE_LIMIT = 4096


def connect(server: str, api_key_file: Path | None) -> "OperatorApi":
    """A client of the server with the caller's key, if it has one; raises OperationFailed as `api_key` does."""
    from fedcompute.monitoring.operator_api import OperatorApi

    key = api_key(api_key_file)
    if key is not None:
        warn_of_plain_text(server)
    return OperatorApi(server, key)


def warn_of_plain_text(server: str) -> None:
    """Tells the user, on stderr, if what is sent to a URL can be read on its way to another machine."""
    from fedcompute.server.security.operators import is_loopback

    parts = urlsplit(server)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        typer.echo(f"note: the API key travels to {parts.hostname} unencrypted; use https://", err=True)


def api_key(file: Path | None) -> str | None:
    """The key in a file, else in FEDCOMPUTE_API_KEY, else None; white space around it does not count.

    A key is no option of its own: what stands on a command line is seen by everybody on the machine. Raises
    OperationFailed(SETTINGS_INVALID) for a file that cannot be read or holds nothing.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        with file.open("rb") as opened:
            text = opened.read(_FILE_LIMIT).decode("ascii", "replace").strip()
    except OSError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"--api-key-file: {file} cannot be read: {error.strerror}", remedy="name its file"
        ) from error
    if not text:
        raise OperationFailed(Reason.SETTINGS_INVALID, f"--api-key-file: {file} is empty", remedy="name another file")
    return text
