"""Where the operator secret comes from: a variable, a file, or one that the server makes at its first start."""

import base64
import contextlib
import logging
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from fedcompute.crypto.sealing import SECRET_BYTES_LIMIT, Sealer, sealer_of
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.server.settings import Settings
from fedcompute.storage.database import Database
from fedcompute.storage.secrets import check_secret, sealed_with

VARIABLE = "FEDCOMPUTE_SECRET"
# In the data directory, beside the database.
FILE_NAME = "secret"

_LOG = logging.getLogger(__name__)


def open_sealer(settings: Settings, database: Database, environment: Mapping[str, str] = os.environ) -> Sealer:
    """The sealer of this server's operator secret: the variable's, else `secret_file`'s, else the data directory's.

    The last is made, readable by its owner only, for a database that no secret has sealed anything in. Raises
    OperationFailed(SETTINGS_INVALID) for a secret that cannot be read or used, and ArtifactInvalid(SECRET_UNREADABLE)
    if the database is sealed with another secret, or there is none.

    Formal guarantees: a made secret has 256 bits from the operating system, and no file of it was ever readable by
    others; two servers that start at once in one data directory get the same.
    """
    given = given_secret(settings, environment)
    sealer = _own_sealer(settings.data_dir / FILE_NAME, database) if given is None else sealer_of(given)
    with database.read() as tx:
        check_secret(tx, sealer)
    return sealer


def _own_sealer(path: Path, database: Database) -> Sealer:
    if not path.exists():
        with database.read() as tx:
            used = sorted(one for one in sealed_with(tx) if one is not None)
        if used:
            raise ArtifactInvalid(
                Reason.SECRET_UNREADABLE,
                f"the database is sealed with operator secret {', '.join(used)}, and this server has none",
                remedy=f"set --secret-file or {VARIABLE}, or put the file {FILE_NAME!r} back into the data directory",
            )
        make_secret_file(path)
    return sealer_of(read_secret_file(path))


def given_secret(settings: Settings, environment: Mapping[str, str] = os.environ) -> bytes | None:
    """The secret that an operator set; None if there is none. Raises OperationFailed(SETTINGS_INVALID)."""
    # Set and empty is a mistake, not a wish for another secret.
    if VARIABLE in environment:
        if settings.secret_file is not None:
            raise OperationFailed(
                Reason.SETTINGS_INVALID, f"both secret_file and {VARIABLE} are set", remedy="set one of them"
            )
        return environment[VARIABLE].encode()
    return None if settings.secret_file is None else read_secret_file(settings.secret_file)


def read_secret_file(path: Path) -> bytes:
    """A file's bytes, at most some kilobytes; raises OperationFailed(SETTINGS_INVALID). Warns if others may read it."""
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & (stat.S_IRGRP | stat.S_IROTH):
                _LOG.warning("others may read the operator secret in %s; chmod 600 keeps them from it", path.name)
            return file.read(SECRET_BYTES_LIMIT + 1)
    except OSError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"the operator secret {path.name!r} cannot be read: {error.strerror}"
        ) from error


def make_secret_file(path: Path) -> None:
    """Writes a fresh secret to `path`, mode 0600, unless there is one; raises OperationFailed(STORAGE_FAILED).

    Formal guarantees: 256 bits from the operating system; the file appears whole or not at all.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(32)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            # Unlike a rename it never replaces the secret of whoever came first.
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink()
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"the operator secret cannot be written: {error.strerror}"
        ) from error
