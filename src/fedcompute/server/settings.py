"""What an operator can set about a server, with the defaults of the specification (spec/server.md 2.3, 11.3)."""

import os
from dataclasses import dataclass
from pathlib import Path

from fedcompute.errors import OperationFailed, Reason

# Devices clamp longer windows to two days (spec/device.md 1.5), and ignore bounds below a millisecond.
_LONGEST_DELAY = 2 * 86_400.0
_SHORTEST_DELAY = 0.001


@dataclass(frozen=True)
class RetryWindow:
    """Seconds within which a device that was turned away comes back, drawn uniformly by the device."""

    minimum: float
    maximum: float


def _default_workers() -> int:
    return max(1, min(4, (os.cpu_count() or 2) - 1))


@dataclass(frozen=True)
class Settings:
    """One server. Durations are seconds, sizes bytes; `None` means a default that depends on other settings.

    Raises OperationFailed(SETTINGS_INVALID) at construction if a value breaks a rule of the wire contract.
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str | None = None  # what devices see; http://localhost:{port} by default
    database_url: str | None = None  # SQLite in data_dir by default
    blob_url: str | None = None  # a directory in data_dir by default

    retry_no_task: RetryWindow = RetryWindow(60.0, 300.0)
    retry_no_active_task: RetryWindow = RetryWindow(86_400.0, 172_800.0)
    retry_version_mismatch: RetryWindow = RetryWindow(86_400.0, 172_800.0)

    signed_url_life: float = 900.0
    artifact_url_life: float = 3_600.0
    local_compute_timeout: float = 900.0
    upload_timeout: float = 900.0

    collector_batch_size: int = 50
    workers: int = 0  # processes that aggregate and update; 0: one less than the CPUs, between 1 and 4
    job_attempts: int = 3

    max_upload_bytes: int = 128 * 1024 * 1024  # as it travels
    max_checkpoint_bytes: int = 512 * 1024 * 1024  # uncompressed; plans as well
    allow_plaintext_uploads: bool = False

    # A key is handed out for key_rotation seconds, is valid as long as a device may remember it, and is kept
    # a day longer for runs and uploads on their way (spec/device.md 2.2).
    key_rotation: float = 7 * 86_400.0
    key_max_age: float = 7 * 86_400.0

    def __post_init__(self) -> None:
        for name in ("retry_no_task", "retry_no_active_task", "retry_version_mismatch"):
            window: RetryWindow = getattr(self, name)
            if not _SHORTEST_DELAY <= window.minimum <= window.maximum <= _LONGEST_DELAY:
                raise _invalid(name, "needs 0.001 <= minimum <= maximum <= 172800 seconds")
        for name in (
            "signed_url_life", "artifact_url_life", "local_compute_timeout", "upload_timeout",
            "collector_batch_size", "job_attempts", "max_upload_bytes", "max_checkpoint_bytes", "key_rotation",
            "key_max_age",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise _invalid(name, "must be greater than 0")
        if self.workers < 0:
            raise _invalid("workers", "must not be negative")
        if self.public_url is not None and not self.public_url.startswith(("https://", "http://localhost:")):
            raise _invalid("public_url", "devices accept https:// and http://localhost:<port> only")

    @property
    def base_url(self) -> str:
        """The URL that devices know this server by, without a trailing slash."""
        return (self.public_url or f"http://localhost:{self.port}").rstrip("/")

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'fedcompute.db').resolve()}"

    @property
    def blobs(self) -> str:
        """URL of the blob store."""
        return self.blob_url or (self.data_dir / "blobs").resolve().as_uri()

    @property
    def worker_count(self) -> int:
        """Number of worker processes."""
        return self.workers or _default_workers()


def _invalid(name: str, rule: str) -> OperationFailed:
    return OperationFailed(Reason.SETTINGS_INVALID, f"setting {name}: {rule}")
