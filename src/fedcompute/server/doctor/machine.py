"""What the stores stand on: the database itself, clocks, disk space, rights of secret files, leases."""

import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import func, select, text

from fedcompute.server.doctor.findings import Finding, Limits, Patient, age, spoken
from fedcompute.server.security.operator_secret import FILE_NAME
from fedcompute.storage import schema
from fedcompute.storage.blobs import local_folder
from fedcompute.storage.database import sqlite_path
from fedcompute.storage.leases import forget_expired_leases

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
# A running server forgets those that nobody needs within ten minutes.
_EXPIRED_FOR = 900.0


def examine_database(patient: Patient, limits: Limits) -> Iterator[Finding]:
    """Damage that SQLite finds in its file, and a clock that does not agree with the rows or the database."""
    with patient.database.read() as tx:
        if tx.dialect.name == "sqlite":
            damage = [str(row[0]) for row in tx.execute(text("PRAGMA quick_check(5)")) if row[0] != "ok"]
            damage += [f"a row of {row[0]} lacks its parent" for row in tx.execute(text("PRAGMA foreign_key_check"))][
                :5
            ]
            if damage:
                yield Finding(
                    "database_damaged",
                    "database",
                    f"the database's file is damaged: {damage[0]}",
                    "stop the server and restore a backup: fedcompute restore",
                    {"problems": len(damage)},
                )
        else:
            there = tx.execute(text("SELECT clock_timestamp()")).scalar_one()
            skew = abs((datetime.now(UTC) - there).total_seconds())
            if skew > limits.skew:
                yield _skew(skew, "the database's clock")
        newest = [
            tx.execute(select(func.max(table.c.status_time))).scalar()
            for table in (schema.task, schema.iteration, schema.assignment)
        ]
    ahead = max((-age(patient, one) for one in newest if one is not None), default=0.0)
    if ahead > limits.skew:
        yield _skew(ahead, "rows that were written in the future")


def examine_leases(patient: Patient) -> Iterator[Finding]:
    """Leases that nobody renews, and those whose holder on this machine is gone."""
    table = schema.lease
    with patient.database.read() as tx:
        rows = tx.execute(select(table).order_by(table.c.name)).all()

    def forget() -> None:
        with patient.database.write() as tx:
            forget_expired_leases(tx, patient.now)

    expired = [row for row in rows if age(patient, row.expires) > _EXPIRED_FOR]
    if expired:
        late = max(age(patient, row.expires) for row in expired)
        yield Finding(
            "leases_expired",
            expired[0].name,
            f"{len(expired)} leases expired up to {spoken(late)} ago and nobody took their work over",
            "start a server with the engine's role; it takes over what the dead one left",
            {"leases": len(expired), "seconds": late},
            forget,
        )
    for row in rows:
        if row.expires > patient.now and _is_dead(row.holder):
            yield Finding(
                "lease_of_dead_process",
                row.name,
                f"the process that holds the lease is gone; it is free in {spoken(-age(patient, row.expires))}",
                "nothing to do if another server runs; else start one",
                {"seconds": -age(patient, row.expires)},
            )


def examine_disk(patient: Patient, limits: Limits) -> Iterator[Finding]:
    """File systems of the database and the blobs that are nearly full."""
    seen: set[int] = set()
    for place in folders(patient):
        if not place.exists() or (device := place.stat().st_dev) in seen:
            continue
        seen.add(device)
        usage = shutil.disk_usage(place)
        if usage.free < limits.free_bytes or usage.free < limits.free_share * usage.total:
            yield Finding(
                "disk_nearly_full",
                place.name,
                f"{usage.free / 2**30:.1f} GiB of {usage.total / 2**30:.1f} are free",
                "free some space, or shorten the retention settings and run: fedcompute retention run",
                {"free_bytes": usage.free, "total_bytes": usage.total},
            )


def examine_rights(patient: Patient) -> Iterator[Finding]:
    """Secret files, and a data directory with devices' updates, that others on this machine may read."""
    settings = patient.settings
    folder = settings.data_dir
    if folder.is_dir() and (mode := stat.S_IMODE(folder.stat().st_mode)) & stat.S_IRWXO:
        yield Finding(
            "data_readable",
            folder.name,
            f"the data directory has mode {mode:03o}: others on this machine reach devices' updates and the database",
            f"chmod o-rwx {folder.name}, or fedcompute doctor --fix",
            {"mode": f"{mode:03o}"},
            _closer(folder, mode & ~stat.S_IRWXO),
        )
    wanted = {
        "the operator secret": settings.secret_file or settings.data_dir / FILE_NAME,
        "the key of the TLS certificate": settings.tls_key,
        "the attestation service's API key": settings.attestation_service_key_file,
    }
    for what, path in wanted.items():
        if path is None or not path.is_file():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & _OTHERS:
            yield Finding(
                "secret_readable",
                path.name,
                f"{what} has mode {mode:03o}: others on this machine may read or change it",
                f"chmod 600 {path.name}, or fedcompute doctor --fix; then replace it if others use this machine",
                {"mode": f"{mode:03o}"},
                _closer(path, 0o600),
            )


def _closer(path: Path, mode: int) -> Callable[[], None]:
    return lambda: path.chmod(mode)


def _skew(seconds: float, what: str) -> Finding:
    return Finding(
        "clock_skew",
        "clock",
        f"this machine's clock and {what} are {seconds:.0f} seconds apart",
        "synchronise the clocks (NTP): time-outs, leases and signed URLs rest on them",
        {"seconds": seconds},
    )


def folders(patient: Patient) -> list[Path]:
    """Where the database and the blobs lie on this machine."""
    found = [patient.settings.data_dir]
    file = sqlite_path(patient.settings.database)
    if file is not None:
        found.append(file.parent)
    blobs = local_folder(patient.settings.blobs)
    if blobs is not None:
        found.append(blobs)
    return found


def _is_dead(holder: str) -> bool:
    """Whether a holder `host/process/...` is a process of this machine that is gone."""
    host, _, rest = holder.partition("/")
    number = rest.partition("/")[0]
    if not host or not socket.gethostname().startswith(host) or not number.isdecimal() or len(number) > 10:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
