"""The blob store against the rows: objects that rows need and that are gone, and objects that no row knows."""

from collections.abc import Callable, Iterator, Sequence

from sqlalchemy import Table, select

from fedcompute.server.doctor.findings import Finding, Patient
from fedcompute.storage import schema
from fedcompute.storage.assignments import chunks
from fedcompute.storage.blobs import BlobTooLarge
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import (
    AGGREGATED,
    BUCKETS,
    GRADIENT,
    MODEL,
    client_checkpoint_path,
    server_checkpoint_path,
)
from fedcompute.storage.references import Reference, references
from fedcompute.storage.schema import ACTIVE_TASK, RELEASED_ITERATION

_LIST_LIMIT = 1_000_000
_PROBES = "_health/"  # the readiness check's
_SHOWN = 5
_NAMED = 20
_CONFIRMED = 10_000


def examine_objects(patient: Patient) -> Iterator[Finding]:
    """Missing and left-over objects; both are confirmed against rows that were read again, since a server may run."""
    with patient.database.read() as tx:
        before = set(references(tx))
    listed: dict[str, list[str]] = {}
    for bucket in BUCKETS:
        try:
            listed[bucket] = patient.blobs.list(bucket, "", limit=_LIST_LIMIT)
        except BlobTooLarge:
            yield Finding(
                "too_many_objects",
                bucket,
                f"bucket {bucket} has more than {_LIST_LIMIT} objects; it was not compared with the rows",
                "shorten the retention settings, or compare it by a listing of the store's own",
            )
    there = {bucket: set(paths) for bucket, paths in listed.items()}
    gone = [one for one in before if one.required and one.bucket in there and one.path not in there[one.bucket]]
    with patient.database.read() as tx:
        still = set(references(tx)) if gone else set()
        left_over = _left_over(tx, listed)
    missing = [
        one for one in sorted(gone)[:_CONFIRMED] if one in still and not patient.blobs.exists(one.bucket, one.path)
    ]
    yield from (_missing(one) for one in missing[:_NAMED])
    if len(missing) > _NAMED:
        yield Finding(
            "objects_missing",
            "blob store",
            f"rows refer to {len(missing)} objects that the store does not have, {_NAMED} of them named above",
            "restore them from a backup; if the store is another server's, correct --blob-url",
            {"objects": len(missing)},
        )
    for (code, what), found in sorted(left_over.items()):
        # Retention may have been at work since the listing.
        if present := [one for one in found[:_CONFIRMED] if patient.blobs.exists(*one)]:
            yield _orphans(patient, code, what, present)


def _missing(one: Reference) -> Finding:
    remedy = {
        GRADIENT: "nothing to do: the contribution is rejected when its batch is added up; look why the store lost it",
        AGGREGATED: "restore it from a backup; else the round makes it anew from its uploads when it needs it",
        MODEL: "restore it from a backup; a round that starts from it cannot go on without it",
    }[one.bucket]
    return Finding(
        "object_missing", f"{one.bucket}/{one.path}", "rows refer to an object that the store does not have", remedy
    )


def _orphans(patient: Patient, code: str, what: str, found: Sequence[tuple[str, str]]) -> Finding:
    shown = ", ".join(f"{bucket}/{path}" for bucket, path in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    if code == "object_unknown":
        return Finding(
            code, what, f"{len(found)} objects are none of this server's: {shown}{more}",
            "give the server a bucket or prefix of its own", {"objects": len(found)},
        )  # fmt: skip
    return Finding(
        code,
        what,
        f"{len(found)} objects belong to nothing: {shown}{more}",
        "remove them with: fedcompute doctor --fix",
        {"objects": len(found)},
        _remover(patient, found),
    )


def _remover(patient: Patient, found: Sequence[tuple[str, str]]) -> Callable[[], None]:
    def remove() -> None:
        for bucket, path in found:
            patient.blobs.delete(bucket, path)

    return remove


def _left_over(tx: Transaction, listed: dict[str, list[str]]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def add(code: str, what: str, bucket: str, path: str) -> None:
        found.setdefault((code, what), []).append((bucket, path))

    rounds, tasks = _rounds(tx), _tasks(tx)
    sessions = _known(tx, schema.assignment, "session_id", _names(listed.get(GRADIENT, []), 4))
    batches = _known(tx, schema.aggregation_batch, "batch_id", _names(listed.get(AGGREGATED, []), 6))
    for bucket, known, position in ((GRADIENT, sessions, 4), (AGGREGATED, batches, 6)):
        for path in listed.get(bucket, []):
            parts = path.split("/")
            where = _place(parts)
            if where is None or len(parts) <= position:
                add("object_unknown", bucket, bucket, path)
            elif where not in rounds or parts[position] not in known:
                add("upload_without_row" if bucket == GRADIENT else "sum_without_row", bucket, bucket, path)
            elif rounds[where].cleaned:
                add("object_left_over", bucket, bucket, path)
    for path in listed.get(MODEL, []):
        if path.startswith(_PROBES):
            continue
        where = _place(path.split("/"))
        if where is None:
            add("object_unknown", MODEL, MODEL, path)
        elif where[0] not in tasks:
            add("object_without_task", MODEL, MODEL, path)
        elif where[1] and where in rounds:
            if _given_up(rounds[where], where, path):
                add("object_left_over", MODEL, MODEL, path)
        elif where[1] and not tasks[where[0]]:
            # An active task may be about to open the round that it belongs to.
            add("object_left_over", MODEL, MODEL, path)
    return found


class _Round:
    """What the attempts of a round say together."""

    def __init__(self) -> None:
        self.cleaned = True
        self.released = False
        self.purged = False


def _given_up(one: _Round, where: tuple[TaskKey, int], path: str) -> bool:
    if not one.cleaned:
        return False
    checkpoints = (server_checkpoint_path(*where), client_checkpoint_path(*where))
    return not one.released or (one.purged and path in checkpoints)


def _rounds(tx: Transaction) -> dict[tuple[TaskKey, int], _Round]:
    table = schema.iteration
    names = ("population_name", "task_id", "result_id", "status", "cleaned_time", "purged_time")
    found: dict[tuple[TaskKey, int], _Round] = {}
    for row in tx.execute(select(*[table.c[name] for name in names])):
        one = found.setdefault((TaskKey(row.population_name, row.task_id), row.result_id), _Round())
        one.cleaned &= row.cleaned_time is not None
        one.released |= row.status in [int(status) for status in RELEASED_ITERATION]
        one.purged |= (
            row.purged_time is not None and row.cleaned_time is not None and (row.purged_time <= row.cleaned_time)
        )
    return found


def _tasks(tx: Transaction) -> dict[TaskKey, bool]:
    """Every task, and whether it is active."""
    table = schema.task
    active = [int(status) for status in ACTIVE_TASK]
    query = select(table.c.population_name, table.c.task_id, table.c.status)
    return {TaskKey(row.population_name, row.task_id): row.status in active for row in tx.execute(query)}


def _place(parts: Sequence[str]) -> tuple[TaskKey, int] | None:
    if len(parts) < 5 or not (parts[1].isdecimal() and parts[2].isdecimal()) or len(parts[1] + parts[2]) > 30:
        return None
    return TaskKey(parts[0], int(parts[1])), int(parts[2])


def _names(paths: Sequence[str], position: int) -> list[str]:
    return sorted({parts[position] for path in paths if len(parts := path.split("/")) > position})


def _known(tx: Transaction, table: Table, name: str, wanted: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for chunk in chunks(wanted):
        found |= set(tx.execute(select(table.c[name]).where(table.c[name].in_(chunk))).scalars())
    return found
