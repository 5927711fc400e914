"""What an operator can set about a server, with the defaults of the specification (spec/server.md 2.3, 11.3)."""

# A field made by `setting` holds an immutable default, whatever the call looks like.
# ruff: noqa: RUF009

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.security.rates import read_networks
from fedcompute.server.setting import (
    ADDRESS,
    AUTHENTICATION,
    KEYS,
    LIMITS,
    LOGS,
    OPERATORS,
    RETENTION,
    ROLES,
    STORAGE,
    WAITING,
    about,
    setting,
)

# Devices clamp longer windows to two days (spec/device.md 1.5), and ignore bounds below a millisecond.
_LONGEST_DELAY = 2 * 86_400.0
_SHORTEST_DELAY = 0.001
_LONGEST_KEPT_DAYS = 36_500
_KEY_SERVICE = ("key_service_a", "key_service_b", "key_service_public_url")


@dataclass(frozen=True)
class RetryWindow:
    """Seconds within which a device that was turned away comes back, drawn uniformly by the device."""

    minimum: float
    maximum: float


def _default_workers() -> int:
    return max(1, min(4, (os.cpu_count() or 2) - 1))


# Where jobs run (`executors.open_executor`).
PROCESSES = "processes"
RAY = "ray"
RAY_ADDRESS = re.compile(r"auto|[\w.-]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}")
# Roles: the HTTP APIs; scheduler, collector, aggregator and updater.
API = "api"
ENGINE = "engine"


@dataclass(frozen=True)
class Settings:
    """One server. Durations are seconds unless named otherwise, sizes bytes.

    `None` means a default that depends on other settings.

    Each field is described here and nowhere else. Raises OperationFailed(SETTINGS_INVALID) at construction if a value
    breaks a rule of the wire contract.
    """

    data_dir: Path = setting(Path("fedcompute-data"), "Where the database and the blobs lie; made if missing.", STORAGE)
    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 for every network.", ADDRESS)
    port: int = setting(8080, "Port to listen on; 0 for any free one.", ADDRESS, minimum=0, maximum=65_535)
    operator_host: str = setting(
        "127.0.0.1", "Address for operators and the dashboard, where operator_port is set.", ADDRESS
    )
    operator_port: int = setting(
        0,
        "A port of its own for operators and the dashboard, which then answer nowhere else; 0: the devices' port.",
        ADDRESS,
        minimum=0,
        maximum=65_535,
    )
    public_url: str | None = setting(
        None, "The URL by which devices know this server.", ADDRESS, shown="http://localhost:PORT, https with TLS"
    )
    tls_certificate: Path | None = setting(
        None,
        "PEM file with the certificate chain; with it the server speaks https only. Read again when it changes.",
        ADDRESS,
    )
    tls_key: Path | None = setting(None, "PEM file with the certificate's private key, not encrypted.", ADDRESS)
    stop_grace: float = setting(
        10.0,
        "Seconds that requests under way may take after a signal to stop; a second signal ends at once.",
        ADDRESS,
        minimum=0,
        maximum=3600,
    )
    database_url: str | None = setting(
        None,
        "SQLAlchemy URL, such as postgresql+psycopg://host/name.",
        STORAGE,
        shown="SQLite in the data directory",
        secret=True,
    )
    blob_url: str | None = setting(
        None, "s3://, gs://, az:// or file:// URL.", STORAGE, shown="a folder in the data directory", secret=True
    )

    blob_urls: str = setting(
        "own",
        "Where devices fetch and upload: through this server, or by signed URLs of the store.",
        STORAGE,
        choices=("own", "store"),
    )

    retry_no_task: RetryWindow = setting(RetryWindow(60.0, 300.0), "When no round needs the device now.", WAITING)
    retry_no_active_task: RetryWindow = setting(
        RetryWindow(86_400.0, 172_800.0), "When its population has no open task.", WAITING
    )
    retry_version_mismatch: RetryWindow = setting(
        RetryWindow(86_400.0, 172_800.0), "When the device's version fits no task.", WAITING
    )

    signed_url_life: float = setting(900.0, "Seconds that an upload URL is valid.", WAITING, above=0)
    artifact_url_life: float = setting(3_600.0, "Seconds that a download URL is valid.", WAITING, above=0)
    local_compute_timeout: float = setting(900.0, "Seconds that a device has to compute.", WAITING, above=0)
    upload_timeout: float = setting(900.0, "Seconds that a device has to upload.", WAITING, above=0)

    roles: tuple[str, ...] = setting(
        (API, ENGINE),
        "What this server does: answer devices and operators, run the rounds. Several servers share one PostgreSQL.",
        ROLES,
        choices=(API, ENGINE),
    )
    collector_batch_size: int = setting(50, "Uploads that are aggregated together.", ROLES, above=0)
    executor: str = setting(
        PROCESSES,
        "What aggregates and updates: processes of this machine, or a Ray cluster.",
        ROLES,
        choices=(PROCESSES, RAY),
    )
    ray_address: str | None = setting(
        None,
        "HOST:PORT of the Ray cluster's head, or auto for the one that this machine is part of. Its nodes must reach "
        "blob_url: an object store, or a directory that all of them share.",
        ROLES,
        shown="a Ray of this machine alone",
    )
    workers: int = setting(
        0,
        "Processes that aggregate and update; 0: one less than the CPUs, 1 to 4, or one for each CPU of a Ray cluster.",
        ROLES,
        minimum=0,
    )
    job_attempts: int = setting(3, "How often a failing job is tried.", ROLES, above=0)
    round_attempts: int = setting(3, "How often a round that expired or failed is tried.", ROLES, above=0)
    round_expiry: float = setting(
        0.0,
        "Seconds after which a round that still collects is tried anew; 0: it may take any time.",
        WAITING,
        minimum=0,
    )
    artifact_expiry: float = setting(
        7 * 86_400.0,
        "Seconds that a new task waits for its artifacts before it fails; 0: for ever.",
        WAITING,
        minimum=0,
    )
    lease_lifetime: float = setting(
        10.0, "Seconds without a sign of life after which another server takes over a server's jobs.", ROLES, above=0
    )

    max_upload_bytes: int = setting(128 * 1024 * 1024, "Largest upload, as it travels.", LIMITS, above=0)
    max_checkpoint_bytes: int = setting(512 * 1024 * 1024, "Largest checkpoint or plan, uncompressed.", LIMITS, above=0)
    max_check_ins: int = setting(1024, "Check-ins answered at once; more are told to come again.", LIMITS, above=0)
    max_reports: int = setting(
        1024, "Reports answered at once; more wait, then are told to come again.", LIMITS, above=0
    )
    max_uploads: int = setting(512, "Uploads taken at once; more wait.", LIMITS, above=0)
    check_ins_per_address: float = setting(0.0, "Check-ins a second of one address; 0: any number.", LIMITS, minimum=0)
    check_ins_per_owner: float = setting(
        0.0, "Check-ins a second of one app's devices; 0: any number.", LIMITS, minimum=0
    )
    challenges_per_address: float = setting(
        0.0, "Challenges a second to one address; 0: any number.", LIMITS, minimum=0
    )
    challenges_per_owner: float = setting(
        0.0, "Challenges a second to one app's devices; 0: any number.", LIMITS, minimum=0
    )
    trusted_proxies: str = setting(
        "", "Addresses or networks, comma-separated, whose X-Forwarded-For is believed.", LIMITS
    )
    allow_plaintext_uploads: bool = setting(False, "Count updates that are not encrypted.", LIMITS)

    authentication: str = setting(
        "off",
        "Which devices are taken: any, those with an enrolment, attested phones, or both kinds.",
        AUTHENTICATION,
        choices=("off", "enrolment", "attestation", "both"),
    )
    attestation_roots: Path | None = setting(
        None, "PEM file with the roots that phones' attestations must lead to.", AUTHENTICATION
    )
    attestation_packages: tuple[str, ...] = setting(
        (),
        "An allowed client as PACKAGE=SHA-256 of its signing certificate in hex; several digests with + between.",
        AUTHENTICATION,
    )
    attestation_revocation_list: Path | None = setting(
        None, "JSON file with revoked serial numbers; read again when it changes.", AUTHENTICATION
    )
    allow_rooted_devices: bool = setting(
        False, "Take phones that did not start a verified, locked system; for tests.", AUTHENTICATION
    )
    attestation_service_url: str | None = setting(
        None, "A service that verifies attestations instead of this server.", AUTHENTICATION, secret=True
    )
    attestation_service_key_file: Path | None = setting(None, "File with the API key of that service.", AUTHENTICATION)
    retry_unauthorized: RetryWindow = setting(
        RetryWindow(60.0, 300.0), "When a device was refused, or could not be checked.", WAITING
    )

    require_api_keys: bool = setting(
        False,
        "Ask for API keys also where the server listens on this machine's own address alone, as behind a proxy.",
        OPERATORS,
    )

    # A key is handed out for twice key_rotation seconds, is valid as long as a device may remember it, and is kept
    # a day longer for runs and uploads on their way (spec/device.md 2.2).
    key_rotation: float = setting(7 * 86_400.0, "Seconds after which a new encryption key is made.", KEYS, above=0)
    key_max_age: float = setting(7 * 86_400.0, "Seconds for which devices may remember a key.", KEYS, above=0)
    secret_file: Path | None = setting(
        None,
        "File with the operator secret, under which keys and secrets are stored; one for all servers of a database. "
        "FEDCOMPUTE_SECRET may hold the secret itself.",
        KEYS,
        shown="made in the data directory",
    )
    encrypt_aggregates: bool | None = setting(
        None,
        "Encrypt partial sums between the jobs that make and those that use them.",
        KEYS,
        shown="on with an external key service",
    )
    key_service_a: str | None = setting(
        None,
        "URL of the first coordinator of an external key service; it holds one share of every key.",
        KEYS,
        secret=True,
    )
    key_service_b: str | None = setting(None, "URL of the second coordinator.", KEYS, secret=True)
    key_service_public_url: str | None = setting(
        None, "URL of the external key service's public keys.", KEYS, secret=True
    )
    key_service_token_a: str | None = setting(
        None,
        "Identity token for the first coordinator: file:PATH, or command:PROGRAM that prints one.",
        KEYS,
        secret=True,
    )
    key_service_token_b: str | None = setting(None, "Identity token for the second coordinator.", KEYS, secret=True)
    key_service_kms_a: str = setting(
        "plain",
        "What decrypts the first coordinator's shares: plain (they are not encrypted), aes:PATH of an AES key, or "
        "command:PROGRAM that asks a key management service.",
        KEYS,
        secret=True,
    )
    key_service_kms_b: str = setting("plain", "What decrypts the second coordinator's shares.", KEYS, secret=True)

    keep_updates_days: float = setting(
        1.0,
        "Days that updates and un-noised sums are kept after their round is over.",
        RETENTION,
        minimum=0,
        maximum=_LONGEST_KEPT_DAYS,
    )
    keep_checkpoints_days: float = setting(
        360.0,
        "Days that a round's checkpoints are kept; the initial and the newest ones stay.",
        RETENTION,
        minimum=0,
        maximum=_LONGEST_KEPT_DAYS,
    )
    keep_newest_checkpoints: int = setting(10, "Newest checkpoints of a task that stay, however old.", RETENTION)
    keep_assignments_days: float = setting(
        360.0,
        "Days that the single assignments of a task are kept after its end.",
        RETENTION,
        minimum=0,
        maximum=_LONGEST_KEPT_DAYS,
    )
    retention_period: float = setting(
        600.0, "Seconds between two looks for what is old; 0: never.", RETENTION, minimum=0, maximum=30 * 86_400
    )
    evaluation_lookback_hours: float = setting(
        0.0,
        "Age in hours up to which evaluations choose a checkpoint; 0: any age.",
        ROLES,
        minimum=0,
        maximum=24 * _LONGEST_KEPT_DAYS,
    )

    log_level: str = setting(
        "warning", "How much is logged, to stderr.", LOGS, choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting("text", "How a line of the log is written.", LOGS, choices=("text", "json"))
    tracing_url: str | None = setting(
        None,
        "URL of an OTLP/HTTP collector for traces, such as http://localhost:4318.",
        LOGS,
        shown="nothing is traced",
        secret=True,
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            problem = _window_fault(value) if isinstance(value, RetryWindow) else about(one).fault(value)
            if problem:
                raise _invalid(one.name, problem)
        self._check_roles()
        self._check_executor()
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise _invalid(missing, "certificate and key are set together or not at all")
        if self.operator_port and self.operator_port == self.port:
            raise _invalid("operator_port", "is the devices' port; leave it out if both are to be one")
        if self.keep_newest_checkpoints < 1:
            raise _invalid("keep_newest_checkpoints", "must be 1 or more: the next round starts from the newest")
        try:
            read_networks(self.trusted_proxies)
        except ValueError:
            raise _invalid("trusted_proxies", "needs addresses or networks, separated by commas") from None
        if self.public_url is not None and not self.public_url.startswith(("https://", "http://localhost:")):
            raise _invalid("public_url", "devices accept https:// and http://localhost:<port> only")

        self._check_authentication()
        self._check_key_service()

    def _check_roles(self) -> None:
        if not self.roles:
            raise _invalid("roles", f"must name {API}, {ENGINE} or both")
        if not (self.runs_api and self.runs_engine) and self.database.startswith("sqlite:"):
            raise _invalid("roles", "SQLite serves one server with all roles; several share one PostgreSQL database")

    def _check_executor(self) -> None:
        if self.ray_address is None:
            return
        if self.executor != RAY:
            raise _invalid("ray_address", f"is for executor {RAY}")
        if not RAY_ADDRESS.fullmatch(self.ray_address):
            raise _invalid("ray_address", "needs HOST:PORT or auto")
        if self.blob_url is None:
            raise _invalid("blob_url", "the nodes of a Ray cluster need an object store or a directory that all share")

    def _check_authentication(self) -> None:
        service = self.attestation_service_url
        if self.authentication in ("attestation", "both"):
            if not self.attestation_packages:
                raise _invalid("attestation_packages", "attested phones need at least one PACKAGE=DIGEST")
            if service is None and self.attestation_roots is None:
                raise _invalid("attestation_roots", "attested phones need trusted roots, or attestation_service_url")
        if service is None:
            return
        if self.authentication == "both":
            # A challenge is made before it is known who will answer, and enrolments answer the server's own.
            raise _invalid("attestation_service_url", "cannot be used together with enrolments; set attestation_roots")
        if not service.startswith(("https://", "http://localhost:", "http://127.0.0.1:")):
            raise _invalid("attestation_service_url", "needs https://, or http://localhost:<port>")
        if self.attestation_service_key_file is None:
            raise _invalid("attestation_service_key_file", "the attestation service needs a key")

    def _check_key_service(self) -> None:
        given = [name for name in _KEY_SERVICE if getattr(self, name) is not None]
        if given and len(given) < len(_KEY_SERVICE):
            missing = ", ".join(name for name in _KEY_SERVICE if name not in given)
            raise _invalid(missing, "an external key service needs both coordinators and its public keys")
        for name in given:
            if not getattr(self, name).startswith(("https://", "http://localhost:", "http://127.0.0.1:")):
                raise _invalid(name, "keys are fetched over https:// only, or http://localhost:<port>")
        for name in ("key_service_token_a", "key_service_token_b"):
            value = getattr(self, name)
            if value is not None and not value.startswith(("file:", "command:")):
                raise _invalid(name, "needs file:PATH or command:PROGRAM")
        for name in ("key_service_kms_a", "key_service_kms_b"):
            value = getattr(self, name)
            if value != "plain" and not value.startswith(("aes:", "command:")):
                raise _invalid(name, "needs plain, aes:PATH or command:PROGRAM")

    @property
    def seals_aggregates(self) -> bool:
        """Whether partial sums are encrypted; by default where an external key service holds the keys."""
        return self.key_service_a is not None if self.encrypt_aggregates is None else self.encrypt_aggregates

    @property
    def base_url(self) -> str:
        """The URL that devices know this server by, without a trailing slash."""
        scheme = "http" if self.tls_certificate is None else "https"
        return (self.public_url or f"{scheme}://localhost:{self.port}").rstrip("/")

    @property
    def splits_operators(self) -> bool:
        """Whether operators have an address of their own."""
        return self.operator_port != 0 and self.runs_api

    @property
    def operator_address(self) -> tuple[str, int]:
        """Where operators are answered, and the dashboard is served: host and port."""
        return (self.operator_host, self.operator_port) if self.splits_operators else (self.host, self.port)

    @property
    def runs_api(self) -> bool:
        """Whether devices and operators are answered here."""
        return API in self.roles

    @property
    def runs_engine(self) -> bool:
        """Whether rounds are run here."""
        return ENGINE in self.roles

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
        """Number of worker processes on this machine."""
        return self.workers or _default_workers()

    @property
    def most_workers(self) -> int:
        """How many jobs may run at a time; 0: one on each CPU of the Ray cluster."""
        return self.worker_count if self.ray_address is None else self.workers


def _window_fault(window: RetryWindow) -> str | None:
    if _SHORTEST_DELAY <= window.minimum <= window.maximum <= _LONGEST_DELAY:
        return None
    return "needs 0.001 <= minimum <= maximum <= 172800 seconds"


def _invalid(name: str, rule: str) -> OperationFailed:
    return OperationFailed(Reason.SETTINGS_INVALID, f"setting {name}: {rule}")
