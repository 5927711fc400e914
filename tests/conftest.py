"""What several rooms' tests share: a cache of their own, a private PostgreSQL, a private S3 server."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import pwd
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Tests leave the user's own cache alone and never profit from it; programs that they start inherit this.
os.environ["FEDCOMPUTE_CACHE_DIR"] = ""
# Hundreds of programs are started: what the first one compiles, the others load.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

_START_SECONDS = 60
# Nothing of it is worth a write to the disk; other tests want the memory.
_FRUGAL = {
    "listen_addresses": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "shared_buffers": "32MB",
    "max_wal_size": "64MB",
    "max_worker_processes": "0",
    "max_connections": "100",
}


# Minutes each, most of them waiting. They begin first, so that none of them is left at the end with the other workers
# idle; pytest-xdist would begin with the files that have the most tests.
_LONGEST_FIRST = (
    "tests/cli/test_quickstart.py",
    "tests/cli/test_api_keys.py",
    "tests/browser/",
    "tests/server/test_fuzz.py",
    "tests/test_docs.py",
    "tests/cli/test_task",
    "tests/end_to_end/",
    "tests/faults/",
    "tests/server/test_slow_jobs.py",
    "tests/server/test_hostile_uploads.py",
    "tests/device/test_simulated_day.py",
    "tests/cli/",
    "tests/builder/",
    "tests/server/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first; tests of one file keep their order."""

    def rank(item: pytest.Item) -> int:
        name = item.nodeid
        return next((number for number, one in enumerate(_LONGEST_FIRST) if name.startswith(one)), len(_LONGEST_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every HTTP client reads all certificate authorities when it is made: here one, as none vouches for loopback."""
    from certifi import contents

    file = tmp_path_factory.mktemp("authority") / "authority.pem"
    file.write_text("".join(contents().partition("-----END CERTIFICATE-----\n")[:2]))
    os.environ["SSL_CERT_FILE"] = str(file)
    os.environ.pop("SSL_CERT_DIR", None)


class PostgreSQL:
    """One private server, reached through a socket in its own directory, and the databases made in it."""

    owner = "fedcompute"

    def __init__(self, directory: Path, programs: Path) -> None:
        self._directory = directory
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self._clean: list[str] = []

    def start(self) -> None:
        """Makes the cluster and waits until it answers; raises RuntimeError with its log if it does not."""
        if os.geteuid() == 0:
            user = _unprivileged()
            os.chown(self._directory, user.pw_uid, user.pw_gid)
        data = self._directory / "data"
        command = [self._programs / "initdb", "--pgdata", data, "--username", self.owner, "--auth", "trust"]
        command += ["--encoding", "UTF8", "--no-sync", "--no-instructions", *_foreign_order(self._programs)]
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self._surroundings())
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stdout.decode()}")
        # Roles whose names begin so need their password.
        (data / "pg_hba.conf").write_text('local all "guarded" scram-sha-256\nlocal all all trust\n')
        self._serve()

    def _surroundings(self) -> dict[str, Any]:
        identity = {}
        # PostgreSQL refuses to run as root.
        if os.geteuid() == 0:
            user = _unprivileged()
            identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        return {"cwd": self._directory, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, **identity}

    def _serve(self) -> None:
        log, data = self._directory / "log", self._directory / "data"
        settings = {**_FRUGAL, "unix_socket_directories": str(self._directory)}
        command = [self._programs / "postgres", "-D", data, *(f"--{name}={value}" for name, value in settings.items())]
        with log.open("wb") as output:
            # In a session of its own: an interrupt from the keyboard is for the tests, which then stop it.
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **self._surroundings()
            )
        deadline = time.monotonic() + _START_SECONDS
        status = data / "postmaster.pid"
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if status.read_text().rstrip().endswith("ready"):
                    return
            time.sleep(0.01)
        raise RuntimeError(f"PostgreSQL does not start: {log.read_text()}")

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """The server is gone for a while, as after a crash, and comes back with what was committed."""
        self.stop()
        try:
            yield
        finally:
            (self._directory / "data" / "postmaster.pid").unlink(missing_ok=True)
            self._serve()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The server and all who work for it stand still for a while, as on a machine that hangs."""
        # First it, so that it starts nobody more.
        self._process.send_signal(signal.SIGSTOP)
        members = [int(one.name) for one in Path("/proc").glob("[0-9]*") if _parent_of(one) == self._process.pid]
        for pid in members:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in [*members, self._process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def url(self, name: str, user: str = owner) -> str:
        return f"postgresql+psycopg://{user}@/{name}?host={self._directory}"

    def create(self) -> str:
        """Makes a database that nothing was ever made in; returns its name."""
        name = f"test_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def drop(self, name: str) -> None:
        """Drops a database under whoever still uses it."""
        self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def take(self) -> str:
        """A database with the present schema and no rows; `give_back` it for the next one who asks."""
        if not self._clean:
            from fedcompute.storage.database import Database

            self._clean.append(self.create())
            Database.open(self.url(self._clean[-1])).close()
        return self._clean.pop()

    def give_back(self, name: str) -> None:
        """Empties every table under whoever still uses the database: that costs a tenth of making a new one."""
        from fedcompute.storage.migrations import HEAD
        from fedcompute.storage.schema import metadata

        self.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        if self.run("SELECT version_num FROM alembic_version", name) != [(HEAD,)]:
            self.drop(name)
            return
        self.run(";".join(f"DELETE FROM {table}" for table in metadata.tables), name)
        self._clean.append(name)

    def run(self, statement: str, database: str = "postgres") -> list[tuple]:
        """Runs one statement as the server's owner; returns its rows, if it has any."""
        import psycopg

        with psycopg.connect(
            host=str(self._directory), dbname=database, user=self.owner, autocommit=True
        ) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


def _parent_of(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _unprivileged() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _programs() -> Path | None:
    """The folder of the newest installed PostgreSQL's own programs; Debian keeps them out of PATH."""
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else []
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(installed, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0), reverse=True)
    usable = (one for one in folders if (one / "postgres").is_file() and (one / "initdb").is_file())
    return next(usable, None)


def _foreign_order(programs: Path) -> list[str]:
    """Options for an order of text that is not the order of its bytes, as operators' databases have."""
    told = subprocess.run([programs / "initdb", "--version"], capture_output=True, text=True, check=True).stdout
    version = int(re.search(r"(\d+)", told.partition(")")[2]).group(1))
    return ["--locale-provider=icu", "--icu-locale=en"] if version >= 15 else []


@pytest.fixture(scope="session")
def postgresql():
    """A private PostgreSQL server of this test process, started for the first test that asks and gone with the last."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="psycopg, the driver of PostgreSQL, is not installed")
    # Not below pytest's own directory, which only root may enter when the tests run as root.
    directory = Path(tempfile.mkdtemp(prefix="fedcompute-pg-"))
    server = PostgreSQL(directory, programs)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)


@pytest.fixture
def postgresql_url(postgresql):
    """A PostgreSQL database with the present schema and no rows."""
    name = postgresql.take()
    yield postgresql.url(name)
    postgresql.give_back(name)


@pytest.fixture
def write_ledger():
    """Returns write(*tasks, budget=None, population="digits") -> Ledger, as a server would keep it.

    A task is a dict: task_id, rounds (one list of events per round), and optionally mechanism, participation,
    devices, separation, goal, contributions, clip_norm (a number, or one per round), metric_clip_norm, kind.
    """
    from fedcompute.privacy.budget import cumulative_epsilon
    from fedcompute.privacy.chain import Release, chained
    from fedcompute.privacy.charges import assumption_of, charged, claim_document, releases
    from fedcompute.privacy.ledger import events_document
    from fedcompute.privacy.ledger_document import Ledger
    from fedcompute.privacy.participation import Participation

    def release(population, task, number, released, mechanism, events, claim, clip_norm, epsilon):
        return Release(
            population=population, task_id=task["task_id"], iteration_id=number, released=released,
            mechanism=mechanism, event=events_document(events) if events else None, claim=claim if events else None,
            clip_norm=clip_norm, report_goal=task["goal"], contributions=task["contributions"],
            cumulative_epsilon=epsilon if epsilon < float("inf") else None, delta=task["delta"],
        )  # fmt: skip

    def write(*tasks, budget=None, population="digits"):
        entries, spent, described = [], {}, {}
        for given in tasks:
            task = {
                "mechanism": "FIXED_GAUSSIAN", "participation": Participation.NO_AMPLIFICATION, "devices": 1000,
                "separation": 0, "goal": 10, "contributions": 10, "clip_norm": 0.5, "delta": 1e-5, "kind": "TRAINING",
                "metric_clip_norm": None, **given,
            }  # fmt: skip
            described[str(task["task_id"])] = {"kind": task["kind"], "status": "COMPLETED", "reason": None}
            claim = claim_document(
                task["participation"], task["devices"], task["separation"], task["goal"], task["delta"]
            )
            for number, events in enumerate(task["rounds"], 1):
                noised = task["metric_clip_norm"] is not None
                model, metrics = (events[:-1], events[-1:]) if noised else (events, [])
                if task["kind"] == "EVALUATION":
                    model = []
                if events:
                    assumption = assumption_of(claim, task["goal"], task["contributions"])
                    spent = charged(spent, task["task_id"], number, events, assumption)
                epsilon = cumulative_epsilon(releases(spent), task["delta"]) if 0 < task["delta"] < 1 else 0.0
                clip = task["clip_norm"][number - 1] if isinstance(task["clip_norm"], list) else task["clip_norm"]
                found = [("metrics", "METRIC_GAUSSIAN" if noised else "NONE", metrics, task["metric_clip_norm"])]
                if task["kind"] == "TRAINING":
                    found.insert(0, ("model", task["mechanism"], model, clip if task["mechanism"] != "NONE" else None))
                for released, mechanism, charges, bound in found:
                    one = release(population, task, number, released, mechanism, charges, claim, bound, epsilon)
                    created = f"2026-01-02T03:{number // 60 % 60:02}:{number % 60:02}.000000+00:00"
                    entries.append(chained(entries[-1] if entries else None, one, created))
        return Ledger(population, tuple(entries), budget, described)

    return write


# Fewer than any client of a store tries again, so that no draw fails a test.
MOST_IN_A_ROW = 3


class ObjectStore:
    """An S3 server on loopback, in threads of the test process, that keeps its objects in memory."""

    region, key, secret = "us-east-1", "test-key", "test-secret-of-nobody"

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._answer = DomainDispatcherApplication(create_backend_app)
        self.ignores_conditions = False  # as S3 servers of other makers may
        self.outages = 0  # requests that get a 503
        self.failure_rate = 0.0  # share of requests that get a 500
        self.loss_rate = 0.0  # share of requests that are carried out and get a 500
        self._random = random.Random(7)
        self._in_a_row: Counter[tuple[str, str]] = Counter()  # bad answers to one question
        self._server = make_server("127.0.0.1", 0, self._app, threaded=True)
        # Devices refuse http://127.0.0.1.
        self.url = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._numbers = itertools.count(1)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(20)

    def bucket(self) -> str:
        """Makes an empty bucket; returns its name."""
        import httpx

        name = f"bucket-{next(self._numbers)}"
        assert httpx.put(f"{self.url}/{name}").status_code == 200
        return name

    def environment(self) -> dict[str, str]:
        """What tells a program, by variables, where the store is and who asks."""
        return {
            "AWS_ENDPOINT": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }

    def _app(self, environ, start_response):
        if self.outages > 0:
            self.outages -= 1
            start_response("503 Slow Down", [("content-length", "0")])
            return [b""]
        question = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self._in_a_row[question] < MOST_IN_A_ROW and self._random.random() < self.failure_rate + self.loss_rate:
            self._in_a_row[question] += 1
            if self.loss_rate:
                list(self._answer(environ, lambda *_: None))
            start_response("500 Internal Error", [("content-length", "0")])
            return [b""]
        self._in_a_row.pop(question, None)
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        return self._answer(environ, start_response)


@pytest.fixture(scope="session")
def s3_server():
    """One S3 server for every test of this process that asks."""
    pytest.importorskip("moto", reason="moto, the S3 server of the tests, is not installed")
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ObjectStore()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The S3 server, with the variables set that lead to it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    yield s3_server
    s3_server.ignores_conditions, s3_server.outages = False, 0
    s3_server.failure_rate = s3_server.loss_rate = 0.0


class QuickstartRun:
    """A quickstart as a user types it, run to its end: its directory, exit status, and what it printed."""

    devices, rounds = 20, 4

    def __init__(self, directory: Path, status: int, output: str, errors: str) -> None:
        self.directory = directory
        self.status = status
        self.output = output
        self.errors = errors


@pytest.fixture(scope="session")
def finished_quickstart(tmp_path_factory: pytest.TempPathFactory) -> QuickstartRun:
    """One run for all workers and test files; whoever writes to its directory takes a copy."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    directory, printed = shared / "quickstart", shared / "quickstart.json"
    with (shared / "quickstart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            command = [sys.executable, "-c", "from fedcompute.cli import main; main()", "quickstart"]
            command += ["--directory", str(directory), "--devices", str(QuickstartRun.devices)]
            command += ["--rounds", str(QuickstartRun.rounds)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
            printed.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    return QuickstartRun(directory, *json.loads(printed.read_text()))


class Collector:
    """An OTLP/HTTP collector on loopback, in a thread of the test process, that keeps the spans it gets."""

    def __init__(self) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if collector.status == 200:
                    collector.bodies.append(body)
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                collector.paths.append(self.path)
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def spans(self) -> list[Any]:
        """Every span so far; beside the protocol's fields `service` and `facts`, its attributes, without prefix."""
        from types import SimpleNamespace

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                about = _attributes(resource.resource.attributes)
                for scope in resource.scope_spans:
                    for one in scope.spans:
                        names = {name.removeprefix("fedcompute."): v for name, v in _attributes(one.attributes).items()}
                        found.append(
                            SimpleNamespace(
                                name=one.name,
                                trace=one.trace_id,
                                id=one.span_id,
                                parent=one.parent_span_id,
                                kind=one.kind,
                                status=one.status,
                                began=one.start_time_unix_nano,
                                ended=one.end_time_unix_nano,
                                facts=names,
                                service=about["service.name"],
                            )
                        )
        return found

    def named(self, name: str) -> list[Any]:
        """The spans of a name, in the order of their beginnings."""
        return sorted((one for one in self.spans() if one.name == name), key=lambda one: one.began)

    def wait(self, name: str, count: int = 1, seconds: float = 20) -> list[Any]:
        """The spans of a name once there are `count` of them."""
        deadline = time.monotonic() + seconds
        while len(self.named(name)) < count:
            assert time.monotonic() < deadline, sorted(one.name for one in self.spans())
            time.sleep(0.02)
        return self.named(name)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _attributes(found: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in found}


@pytest.fixture
def collector(monkeypatch):
    """A collector that is sent spans a moment after they end."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    running = Collector()
    yield running
    running.close()
