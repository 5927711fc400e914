"""Another operator secret for a database whose servers are stopped."""

import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedcompute.crypto.sealing import Sealer, sealer_of
from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.security.operator_secret import (
    FILE_NAME,
    VARIABLE,
    given_secret,
    make_secret_file,
    read_secret_file,
)
from fedcompute.server.settings import Settings
from fedcompute.storage.claim import Claim
from fedcompute.storage.database import Database, sqlite_file
from fedcompute.storage.leases import any_lease
from fedcompute.storage.secrets import check_sealed, reseal, seal_plain


@dataclass(frozen=True)
class Rotation:
    """What a rotation did: ids of the secrets, how many values it sealed anew, where the old secret's file went."""

    old: str
    new: str
    values: int
    old_file: Path | None


def rotate_secret(
    settings: Settings, new_secret_file: Path | None, environment: Mapping[str, str] = os.environ
) -> Rotation:
    """Seals every stored secret with another operator secret instead of the present one; servers must be stopped.

    Without `new_secret_file` the data directory's own secret is replaced by one made here, and the old file kept
    beside it, since backups made before open with nothing else. A rotation that was cut off is finished by the next.
    Raises OperationFailed: DATA_IN_USE while a server runs, SETTINGS_INVALID if secrets cannot be read or are the same;
    ArtifactInvalid(SECRET_UNREADABLE) if a value opens with neither.

    Formal guarantees: one transaction: afterwards all values are sealed with the new secret, or all as before. In an
    SQLite file nothing sealed with the old one remains; in backups, and in PostgreSQL until it vacuums, it does.
    """
    given = given_secret(settings, environment)
    own, draft = settings.data_dir / FILE_NAME, settings.data_dir / f"{FILE_NAME}.new"
    if new_secret_file is None and given is not None:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"the present secret comes from secret_file or {VARIABLE}",
            remedy="name the file with the new one: --new-secret-file FILE",
        )
    file = sqlite_file(settings.database)
    with nullcontext() if file is None else Claim(file.with_name(file.name + ".lock")):
        old = sealer_of(read_secret_file(own) if given is None else given)
        if new_secret_file is None:
            make_secret_file(draft)
        new = sealer_of(read_secret_file(new_secret_file or draft))
        if old.id == new.id:
            raise OperationFailed(
                Reason.SETTINGS_INVALID, "the new operator secret is the present one", remedy="name another file"
            )
        database = Database.open(settings.database)
        try:
            values = _reseal(database, old, new)
        finally:
            database.close()
        kept = None
        if new_secret_file is None:
            kept = settings.data_dir / f"{FILE_NAME}.{old.id}"
            # At every moment there is a whole file at `own`.
            with suppress(FileExistsError):
                os.link(own, kept)
            draft.replace(own)
        return Rotation(old.id, new.id, values, kept)


def _reseal(database: Database, old: Sealer, new: Sealer) -> int:
    with database.write() as tx:
        if any_lease(tx, datetime.now(UTC)):
            raise OperationFailed(Reason.DATA_IN_USE, "a server works on the database")
        seal_plain(tx, old)
        values = reseal(tx, old, new)
        check_sealed(tx, new)
    database.scrub()
    return values
