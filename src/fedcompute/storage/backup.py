"""Backup and restore: one server's database and objects as a folder that any kind of database can be made from.

The database comes first, as one moment; then the objects that its rows refer to. A server writes an object before the
row that tells of it and removes it after, so beside a server that runs every row finds its objects. The manifest is
written last: a folder without one is no backup.
"""

import asyncio
import gzip
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Table, func, select

from fedcompute import __version__
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.privacy.chain import verify_chain
from fedcompute.storage import schema
from fedcompute.storage.blobs import BlobMissing, BlobStore, BlobTooLarge, open_blob_store
from fedcompute.storage.database import Database, Transaction
from fedcompute.storage.migrations import HEAD
from fedcompute.storage.paths import BUCKETS
from fedcompute.storage.references import Reference, references
from fedcompute.storage.releases import ledger_entries
from fedcompute.storage.table_files import read_table, sha256_of, write_table

FORMAT = "fedcompute-backup"
VERSION = 1
_MANIFEST, _INDEX, _TABLES, _BLOBS = "manifest.json", "blobs.jsonl.gz", "tables", "blobs"
_MANIFEST_LIMIT = 64 * 1024 * 1024
_LINE_LIMIT = 64 * 1024
_OBJECT_LIMIT = 1 << 40
_AT_ONCE = 8
# Leases belong to processes.
_LEFT_OUT = ("lease",)

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Manifest:
    """What a backup says about itself; `missing` are required objects that the store did not have."""

    format: str
    version: int
    release: str
    schema: str
    created: str  # the moment of the database, ISO 8601, UTC
    tables: dict[str, dict[str, Any]]  # name -> rows, sha256
    objects: int
    bytes: int
    index_sha256: str
    ledger_heads: dict[str, str]  # population -> hash of its ledger's last entry
    sealed_with: list[str]  # the operator secrets without which the backup's keys are of no use
    missing: list[str]


@dataclass(frozen=True)
class _Object:
    bucket: str
    path: str
    size: int
    sha256: str


def back_up(
    database: Database, blobs: BlobStore, folder: Path, now: datetime, progress: Progress = lambda *_: None
) -> Manifest:
    """Writes a backup into a new or empty folder, readable by its owner only; the server may run meanwhile.

    Raises OperationFailed: BACKUP_TARGET_IN_USE if the folder holds anything, STORAGE_FAILED for stores that fail.

    Formal guarantees: the rows are those of one moment, and each object is as it was at that moment or later, which
    for objects that rows refer to is the same: none of them is changed once a row tells of it. Raw updates of rounds
    that are released are not in it.
    """
    _make(folder)
    tables: dict[str, dict[str, Any]] = {}
    with database.read() as tx:
        kept = _tables()
        for number, table in enumerate(kept):
            progress("tables", number, len(kept))
            tables[table.name] = asdict(write_table(tx, table, folder / _TABLES / f"{table.name}.jsonl.gz"))
        wanted = sorted(set(references(tx)))
        heads = {name: entries[-1].hash for name, entries in _ledgers(tx)}
        sealed_with = _sealed_with(tx)
    found, missing = asyncio.run(_copy_all(blobs, open_blob_store(str(folder / _BLOBS)), _once(wanted), progress))
    with gzip.open(folder / _INDEX, "xb") as file:
        for one in found:
            file.write(json.dumps([one.bucket, one.path, one.size, one.sha256]).encode() + b"\n")
    manifest = Manifest(
        FORMAT, VERSION, __version__, HEAD, now.isoformat(), tables, len(found), sum(one.size for one in found),
        sha256_of(folder / _INDEX), heads, sealed_with, missing,
    )  # fmt: skip
    # All of it is on the disk before the manifest says so.
    os.sync()
    document = asdict(manifest)
    draft = folder / f".{_MANIFEST}"
    draft.write_text(json.dumps({**document, "digest": _digest(document)}, indent=1, sort_keys=True) + "\n")
    draft.rename(folder / _MANIFEST)
    return manifest


def check_backup(folder: Path, progress: Progress = lambda *_: None) -> Manifest:
    """The manifest of a backup whose every file is whole.

    Raises ArtifactInvalid: BACKUP_DAMAGED, naming the first file that is not.

    Formal guarantees: files and manifest are, up to collisions of SHA-256, those that were written together. Whoever
    can write to the folder can make another backup; keep the manifest's digest elsewhere to notice.
    """
    manifest = _read_manifest(folder)
    for name, facts in manifest.tables.items():
        _same(folder / _TABLES / f"{name}.jsonl.gz", facts["sha256"])
    _same(folder / _INDEX, manifest.index_sha256)
    for number, one in enumerate(_index(folder)):
        progress("objects checked", number, manifest.objects)
        _same(folder / _BLOBS / one.bucket / one.path, one.sha256)
    return manifest


def restore(database: Database, blobs: BlobStore, folder: Path, progress: Progress = lambda *_: None) -> Manifest:
    """Fills an empty database and an empty blob store from a backup: objects first, then all rows in one transaction.

    Raises ArtifactInvalid: BACKUP_DAMAGED, or LEDGER_TAMPERED for a ledger that is no chain up to the noted head;
    OperationFailed: BACKUP_TARGET_IN_USE if there is anything in either store, BACKUP_FOREIGN for a backup of another
    schema, STORAGE_FAILED. The database then is as it was.

    Formal guarantees: either all rows are there or none, and with them every object of the backup, whole.
    """
    manifest = check_backup(folder, progress)
    if manifest.schema != HEAD:
        raise OperationFailed(
            Reason.BACKUP_FOREIGN,
            f"the backup has schema {manifest.schema}, this release ({__version__}) knows {HEAD}",
            remedy=f"restore it with release {manifest.release}, then start the newer one",
        )
    _refuse_used(database, blobs)
    objects = [Reference(one.bucket, one.path, True) for one in _index(folder)]
    _, missing = asyncio.run(_copy_all(open_blob_store(str(folder / _BLOBS)), blobs, objects, progress))
    if missing:
        raise ArtifactInvalid(Reason.BACKUP_DAMAGED, f"object {missing[0]} of the backup is gone")
    with database.write() as tx:
        kept = _tables()
        for number, table in enumerate(kept):
            progress("tables", number, len(kept))
            rows = read_table(tx, table, folder / _TABLES / f"{table.name}.jsonl.gz")
            if rows != manifest.tables.get(table.name, {}).get("rows"):
                raise ArtifactInvalid(Reason.BACKUP_DAMAGED, f"table {table.name} of the backup has {rows} rows")
        _verify_ledgers(tx, manifest)
    return manifest


def _verify_ledgers(tx: Transaction, manifest: Manifest) -> None:
    ledgers = dict(_ledgers(tx))
    for population in sorted(ledgers.keys() | manifest.ledger_heads.keys()):
        problems = verify_chain(ledgers.get(population, []), noted=manifest.ledger_heads.get(population))
        if problems:
            raise ArtifactInvalid(Reason.LEDGER_TAMPERED, f"the ledger of {population}: {problems[0]}")


def _tables() -> list[Table]:
    return [table for table in schema.metadata.sorted_tables if table.name not in _LEFT_OUT]


def _ledgers(tx: Transaction) -> Iterator[tuple[str, list[Any]]]:
    table = schema.privacy_ledger
    names = tx.execute(select(table.c.population_name).distinct().order_by(table.c.population_name)).scalars().all()
    for name in names:
        yield name, ledger_entries(tx, name, limit=_OBJECT_LIMIT)


def _sealed_with(tx: Transaction) -> list[str]:
    found: set[str] = set()
    for table in schema.metadata.sorted_tables:
        if "sealed_with" in table.c:
            found |= {one for one in tx.execute(select(table.c.sealed_with).distinct()).scalars() if one}
    return sorted(found)


def _once(wanted: Sequence[Reference]) -> list[Reference]:
    """Each object once, required if anybody requires it."""
    required: dict[tuple[str, str], bool] = {}
    for one in wanted:
        required[one.bucket, one.path] = required.get((one.bucket, one.path), False) or one.required
    return [Reference(bucket, path, needed) for (bucket, path), needed in sorted(required.items())]


async def _copy_all(
    source: BlobStore, target: BlobStore, wanted: Sequence[Reference], progress: Progress
) -> tuple[list[_Object], list[str]]:
    """Copies what there is, some at a time; returns it in order, and the required ones that there are not."""
    found: list[_Object | None] = [None] * len(wanted)
    todo = iter(range(len(wanted)))
    done = 0

    async def work() -> None:
        nonlocal done
        for number in todo:
            with suppress(BlobMissing):
                found[number] = await _copy(source, target, wanted[number])
            done += 1
            progress("objects", done, len(wanted))

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(work())
    pairs = list(zip(wanted, found, strict=True))
    missing = [f"{one.bucket}/{one.path}" for one, copied in pairs if copied is None and one.required]
    return [copied for _, copied in pairs if copied is not None], missing


async def _copy(source: BlobStore, target: BlobStore, one: Reference) -> _Object:
    stream = await source.open_stream(one.bucket, one.path)
    digest = hashlib.sha256()

    async def chunks() -> AsyncIterator[bytes]:
        async for chunk in stream.chunks:
            digest.update(chunk)
            yield chunk

    size = await target.put_stream(one.bucket, one.path, chunks(), _OBJECT_LIMIT)
    return _Object(one.bucket, one.path, size, digest.hexdigest())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OperationFailed(Reason.BACKUP_TARGET_IN_USE, f"the folder {folder.name!r} is not empty")
        # It holds what the server keeps secret.
        folder.chmod(0o700)
        (folder / _TABLES).mkdir()
        (folder / _BLOBS).mkdir()
    except OSError as error:
        raise OperationFailed(Reason.STORAGE_FAILED, f"the backup's folder cannot be made: {error.strerror}") from error


def _refuse_used(database: Database, blobs: BlobStore) -> None:
    with database.read() as tx:
        for table in _tables():
            rows = tx.execute(select(func.count()).select_from(table)).scalar_one()
            if rows:
                raise OperationFailed(
                    Reason.BACKUP_TARGET_IN_USE, f"table {table.name} of the database has {rows} rows already"
                )
    for bucket in BUCKETS:
        with suppress(BlobTooLarge):
            if not blobs.list(bucket, "", limit=0):
                continue
        raise OperationFailed(Reason.BACKUP_TARGET_IN_USE, f"bucket {bucket} of the blob store holds objects already")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / _MANIFEST
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MANIFEST_LIMIT))
        digest = document.pop("digest")
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise OperationFailed(
                Reason.BACKUP_FOREIGN,
                f"{path.name} is of format {document.get('format')!r}, version {document.get('version')!r}",
            )
        manifest = Manifest(**document)
        if not all(name.isidentifier() and "sha256" in facts for name, facts in manifest.tables.items()):
            raise ValueError("a table's name is none")
    except FileNotFoundError:
        raise ArtifactInvalid(
            Reason.BACKUP_DAMAGED, f"the folder {folder.name!r} has no {_MANIFEST}: no backup, or one that was cut off"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactInvalid(Reason.BACKUP_DAMAGED, f"{path.name} cannot be read: {type(error).__name__}") from error
    if digest != _digest(document):
        raise ArtifactInvalid(Reason.BACKUP_DAMAGED, f"{path.name} is not as it was written")
    return manifest


def _index(folder: Path) -> Iterator[_Object]:
    try:
        with gzip.open(folder / _INDEX, "rb") as file:
            while line := file.readline(_LINE_LIMIT):
                one = _Object(*json.loads(line))
                if one.bucket not in BUCKETS or ".." in one.path.split("/") or one.path.startswith("/"):
                    raise ValueError("a path leaves its bucket")
                yield one
    except (OSError, EOFError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactInvalid(Reason.BACKUP_DAMAGED, f"{_INDEX} cannot be read: {type(error).__name__}") from error


def _same(path: Path, sha256: str) -> None:
    try:
        whole = sha256_of(path) == sha256
    except OSError as error:
        raise ArtifactInvalid(Reason.BACKUP_DAMAGED, f"{path.name} of the backup: {error.strerror}") from error
    if not whole:
        raise ArtifactInvalid(Reason.BACKUP_DAMAGED, f"{path.parent.name}/{path.name} is not as it was written")


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
