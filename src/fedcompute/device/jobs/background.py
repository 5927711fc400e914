"""What a device does beside training (spec/device.md 6.7, 9.3). Times are Unix milliseconds."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from fedcompute.device.allow_lists import allows
from fedcompute.device.jobs.conditions import TRAINING, Constraint
from fedcompute.device.jobs.flags import Flags, flags
from fedcompute.device.state.apps import OWNED_TABLES, list_apps
from fedcompute.device.state.database import DeviceDatabase, Transaction
from fedcompute.device.state.history import delete_expired
from fedcompute.device.state.settings import RESET

Work = Callable[[], Awaitable[None]]

MAX_LOG_AGE = 60 * 86_400_000
"""How long requests, events and the device's log are kept."""

_HOUR = 3_600_000
# All that tells of a user. What vendors publish, keys, flags and consent itself are not among it.
_USER_TABLES = (
    "local_data", "event_log", "request_log", "error_count", "device_log",
    "task", "registration", "resumption", "task_history", "authorization_token",
)  # fmt: skip


@dataclass(frozen=True)
class BackgroundJob:
    """`number`: its job id on Android, 1000 and 1001 of the federated compute service, the others of the
    personalization service. `period`: milliseconds from start to start, None for a job that somebody else sets and
    that runs once. `kill_switches`: the flags that stop it.
    """

    name: str
    number: int
    period: int | None
    constraints: frozenset[Constraint]
    work: Work
    kill_switches: tuple[str, ...] = ("global_kill_switch",)


def background_jobs(
    database: DeviceDatabase, clock: Callable[[], int], *, fetch_keys: Work, download: Work
) -> Mapping[str, BackgroundJob]:
    """The background jobs of a device, by name. `clock`: Unix milliseconds.

    `fetch_keys` fetches encryption keys and forgets expired ones; `download` fetches and processes what vendors
    publish. Android's job 1006 has no place here: what services are told of the device is read when they ask.
    """

    async def fetch() -> None:
        with database.read() as tx:
            wanted = flags(tx).boolean("enable_background_encryption_key_fetch")
        if wanted:
            await fetch_keys()

    async def expire() -> None:
        with database.write() as tx:
            delete_expired(tx, clock() / 1000, flags(tx).integer("task_history_ttl_millis") / 1000)

    async def maintain() -> None:
        with database.write() as tx:
            clean_up(tx, clock(), flags(tx))

    async def reset() -> None:
        with database.write() as tx:
            wipe_user_data(tx)
        database.forget()

    idle = frozenset({Constraint.IDLE, Constraint.BATTERY_NOT_LOW})
    spare = frozenset({Constraint.BATTERY_NOT_LOW, Constraint.STORAGE_NOT_LOW})
    federated = ("global_kill_switch", "federated_compute_kill_switch")
    jobs = (
        BackgroundJob("encryption_key_fetch", 1000, 24 * _HOUR, TRAINING, fetch, federated),
        BackgroundJob("delete_expired", 1001, 24 * _HOUR, idle, expire, federated),
        BackgroundJob("download", 1004, 6 * _HOUR, frozenset({Constraint.UNMETERED}), download),
        BackgroundJob("maintenance", 1005, 24 * _HOUR, spare, maintain),
        # Nothing keeps what a user has withdrawn.
        BackgroundJob(RESET, 1007, None, frozenset(), reset, ()),
    )
    return {job.name: job for job in jobs}


def set_up(tx: Transaction, jobs: Iterable[BackgroundJob], now: int) -> None:
    """Makes periodic jobs that have never run due now."""
    for job in jobs:
        if job.period is not None:
            tx.execute("INSERT OR IGNORE INTO background_job (name, earliest_run) VALUES (?, ?)", (job.name, now))


def earliest_runs(tx: Transaction) -> list[tuple[str, int]]:
    """The jobs that are set, and when each is due; the next one first."""
    rows = tx.execute("SELECT name, earliest_run FROM background_job ORDER BY earliest_run, name")
    return [(str(name), int(earliest)) for name, earliest in rows]


def begin(tx: Transaction, job: BackgroundJob, now: int) -> bool:
    """Notes that a job starts; False if it is not due, or not set."""
    statement = "UPDATE background_job SET last_run_start = ? WHERE name = ? AND earliest_run <= ?"
    return tx.execute(statement, (now, job.name, now)).rowcount > 0


def end(tx: Transaction, job: BackgroundJob, start: int, now: int, success: bool) -> int | None:
    """Notes that a job ended; returns when it is due again. One that runs once is gone after its success, and due an
    hour after a failure.
    """
    if job.period is None and success:
        tx.execute("DELETE FROM background_job WHERE name = ?", (job.name,))
        return None
    earliest = now + _HOUR if job.period is None else max(now, start + job.period)
    statement = "UPDATE background_job SET last_run_end = ?, earliest_run = ? WHERE name = ?"
    tx.execute(statement, (now, earliest, job.name))
    return earliest


def force(tx: Transaction, name: str) -> bool:
    """Makes a job due now; its constraints stay. False if it is not set."""
    return tx.execute("UPDATE background_job SET earliest_run = 0 WHERE name = ?", (name,)).rowcount > 0


def wipe_user_data(tx: Transaction) -> None:
    """Deletes everything that tells of the user (spec 9.3).

    Formal guarantees: after it no row is left of local data, requests, events, counts of errors, the device's log,
    tasks, registrations, resumption tokens, contributions and authorization tokens; SQLite overwrites what it frees in
    its file, and `DeviceDatabase.forget` cuts off its log. Copies elsewhere, and what a disk keeps of a file that was
    cut off, are out of reach.
    """
    for table in _USER_TABLES:
        tx.execute(f"DELETE FROM {table}")


def clean_up(tx: Transaction, now: int, flags: Flags) -> None:
    """Deletes requests, events and log entries older than 60 days, and all that is stored for a service that is not
    installed or no longer on `isolated_service_allow_list`.
    """
    for table in ("event_log", "request_log", "device_log"):
        tx.execute(f"DELETE FROM {table} WHERE time < ?", (now - MAX_LOG_AGE,))
    allowed = flags.text("isolated_service_allow_list")
    apps = [app for app in list_apps(tx) if allows(allowed, app.owner.package, app.owner.certificate_digest)]
    _keep(tx, [app.owner.digest for app in apps])


def _keep(tx: Transaction, owners: list[str]) -> None:
    """Deletes what is stored for other owners than these; their authorization tokens expire by themselves."""
    foreign = f"NOT IN ({', '.join('?' * len(owners))})"
    for table in ("resumption", "task_history"):
        # Contributions of runs that nobody scheduled stay.
        tx.execute(
            f"DELETE FROM {table} WHERE job_id IN (SELECT job_id FROM registration WHERE owner {foreign})", owners
        )
    for table in (*OWNED_TABLES, "task"):
        # What the device's log says of itself has no owner; to SQLite even NULL is not in an empty list.
        tx.execute(f"DELETE FROM {table} WHERE owner IS NOT NULL AND owner {foreign}", owners)
