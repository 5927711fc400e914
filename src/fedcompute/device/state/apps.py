"""The apps of a device: which services there are, where their code lies, what they declare (spec/device.md 8)."""

from dataclasses import dataclass
from pathlib import Path

from fedcompute.device.owner import Owner
from fedcompute.device.state.database import Transaction

# What is stored for an owner and goes with its app (spec 9.3).
OWNED_TABLES = (
    "remote_data", "local_data", "registration", "error_count", "event_log", "request_log", "device_log",
)  # fmt: skip

_COLUMNS = "package, class_name, certificate_digest, code, server, download, sync_token"


@dataclass(frozen=True)
class App:
    """One installed service. `server`, `download`: URLs that its manifest declares; `sync_token`: of the last download
    that was kept, None before the first.
    """

    owner: Owner
    code: Path
    server: str | None = None
    download: str | None = None
    sync_token: int | None = None


def install(tx: Transaction, app: App, now: int) -> None:
    """Installs an app or replaces its code and manifest. Another certificate starts with nothing (spec 9.3)."""
    replaced = find_app(tx, app.owner.package, app.owner.class_name)
    if replaced is not None and replaced.owner != app.owner:
        uninstall(tx, replaced.owner)
    tx.execute(
        "INSERT INTO app (owner, package, class_name, certificate_digest, code, server, download, installed)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (owner) DO UPDATE SET"
        " code = excluded.code, server = excluded.server, download = excluded.download",
        (
            app.owner.digest,
            app.owner.package,
            app.owner.class_name,
            app.owner.certificate_digest,
            str(app.code),
            app.server,
            app.download,
            now,
        ),
    )


def uninstall(tx: Transaction, owner: Owner) -> bool:
    """Removes an app with all that is stored for it, its tasks included; whether there was one."""
    jobs = (
        "SELECT job_id FROM (SELECT job_id, owner FROM task UNION SELECT job_id, owner FROM registration)"
        # A job id is a short hash; one of another's tasks may be the same.
        " WHERE owner = ? AND job_id NOT IN (SELECT job_id FROM task WHERE owner <> ?)"
    )
    for table in ("resumption", "task_history"):
        tx.execute(f"DELETE FROM {table} WHERE job_id IN ({jobs})", (owner.digest, owner.digest))
    for table in (*OWNED_TABLES, "task"):
        tx.execute(f"DELETE FROM {table} WHERE owner = ?", (owner.digest,))
    tx.execute("DELETE FROM authorization_token WHERE owner_id = ?", (owner.id,))
    return tx.execute("DELETE FROM app WHERE owner = ?", (owner.digest,)).rowcount > 0


def find_app(tx: Transaction, package: str, class_name: str) -> App | None:
    """The app of a component, None if it is not installed."""
    row = tx.execute(
        f"SELECT {_COLUMNS} FROM app WHERE package = ? AND class_name = ?", (package, class_name)
    ).fetchone()
    return None if row is None else _app(row)


def list_apps(tx: Transaction) -> list[App]:
    """All installed apps by component."""
    return [_app(row) for row in tx.execute(f"SELECT {_COLUMNS} FROM app ORDER BY package, class_name")]


def _app(row: tuple[str, str, str, str, str | None, str | None, int | None]) -> App:
    package, class_name, digest, code, server, download, sync_token = row
    return App(Owner(package, class_name, digest), Path(code), server, download, sync_token)
