"""Jobs and rounds on a real Ray cluster of several nodes, on loopback, of which one is lost."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.protos import learning_pb2
from fedcompute.server.executors import open_executor
from fedcompute.server.logs import Logs, bound, configure_logging
from fedcompute.server.ray_driver import lanes_of
from fedcompute.server.rounds.jobs import Jobs
from fedcompute.server.settings import Settings
from fedcompute.storage.keys import IterationKey

pytest.importorskip("ray", reason="ray, the optional executor for several machines, is not installed")

TRAINABLE = "server/global_model_weights/trainable"
JOBS = """
import logging, os, pathlib, signal, time
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.tracing import span
def pid(_): return os.getpid()
def same(value): return value
def fail(text): raise ValueError(text)
def refuse(remedy): raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, 'no', remedy=remedy)
def tell(text):
    with span('inner', {'text': text}): logging.getLogger('jobs').warning('said %s', text)
def die(_): os.kill(os.getpid(), signal.SIGKILL)
def wait_for(path):
    while not pathlib.Path(path).exists(): time.sleep(0.02)
    return os.getpid()
def die_once(path):
    if pathlib.Path(path).exists(): return 'survived'
    pathlib.Path(path).touch()
    die(None)
"""


# What `ray start` does, which has no way to keep several nodes on loopback.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for line in sys.stdin:
    node = cluster.add_node(
        num_cpus=int(line), object_store_memory=80 << 20, node_ip_address="127.0.0.1", include_dashboard=False,
        include_log_monitor=False,
    )
    print(cluster.address, node.all_processes["raylet"][0].process.pid, flush=True)
"""


def descendants(pid):
    """The process and those that it and they started, as long as they live."""
    parents = {}
    for one in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(one.parent.name)] = int(one.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def lose(pid):
    """Ends the process and its descendants, as when a machine loses its power."""
    for one in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


class RayCluster:
    """A head without CPUs, and nodes with one each, as processes of this machine."""

    def __init__(self, environment):
        # Not pytest's, because the name of a socket below it may have a hundred characters.
        self._directory = tempfile.mkdtemp(prefix="ray-")
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "RAY_TMPDIR": self._directory},
            text=True,
        )
        self.address, _ = self._add(0)
        self.first = self.add()

    def add(self):
        """Starts a node with one CPU; returns its process."""
        return self._add(1)[1]

    def _add(self, cpus):
        self._process.stdin.write(f"{cpus}\n")
        self._process.stdin.flush()
        address, pid = self._process.stdout.readline().split()
        return address, int(pid)

    def close(self):
        lose(self._process.pid)
        self._process.wait(20)
        self._process.stdin.close()
        self._process.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A module that the nodes can import too."""
    directory = tmp_path_factory.mktemp("jobs")
    (directory / "ray_jobs.py").write_text(JOBS)
    sys.path.insert(0, str(directory))
    import ray_jobs

    yield ray_jobs
    sys.path.remove(str(directory))
    del sys.modules["ray_jobs"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, jobs, s3_server):
    environment = {
        **os.environ,
        **s3_server.environment(),
        "PYTHONPATH": str(Path(jobs.__file__).parent),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "500",
        "RAY_health_check_failure_threshold": "4",
        "HOME": str(tmp_path_factory.mktemp("home")),
    }
    running = RayCluster(environment)
    yield running
    running.close()


@pytest.fixture(scope="module")
def near():
    """Whoever joins the cluster: no token of this user's is meant for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def executor(cluster, near):
    running = open_executor("ray", cluster.address, 0)
    yield running
    running.close()


class Gate:
    """Holds the readers of uploads up, and counts them."""

    def __init__(self, store, monkeypatch):
        self.opened = threading.Event()
        self._lock = threading.Lock()
        self.waiting = 0
        self._answer = store._answer
        monkeypatch.setattr(store, "_answer", self)

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] == "GET" and "/gradient/" in environ["PATH_INFO"]:
            with self._lock:
                self.waiting += 1
            assert self.opened.wait(60)
        return self._answer(environ, start_response)


@pytest.fixture
def gate(s3, monkeypatch):
    made = Gate(s3, monkeypatch)
    yield made
    made.opened.set()


def contribute(apis, process, hand_made, population, count):
    """Devices with the values 0, 1, ... through one server after the other."""

    def one(number):
        deltas = [np.full(leaf.shape, float(number)) for leaf in hand_made.initial]
        apis[number % len(apis)].contribute(population, hand_made.update_of(process, deltas))

    with ThreadPoolExecutor(4) as devices:
        list(devices.map(one, range(count)))


def wait_until(question, seconds=60):
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_jobs_run_elsewhere_and_tell_what_became_of_them(executor, jobs, caplog, tmp_path):
    assert executor.submit(jobs.pid, None).result(60) != os.getpid()
    with pytest.raises(OperationFailed, match="no luck"):
        executor.submit(jobs.fail, "no luck").result(60)
    assert "ValueError: no luck" in caplog.records[-1].trace
    with pytest.raises(OperationFailed) as refused:
        executor.submit(jobs.refuse, "install it").result(60)
    assert (refused.value.reason, refused.value.remedy) == (Reason.PLAN_UNSUPPORTED, "install it")
    assert executor.submit(jobs.die_once, str(tmp_path / "marker")).result(60) == "survived"
    with pytest.raises(OperationFailed, match="died"):
        executor.submit(jobs.die, None).result(60)
    array = np.arange(1 << 17)
    np.testing.assert_array_equal(executor.submit(jobs.same, array).result(60), array)
    with pytest.raises(OperationFailed, match="function of a module"):
        executor.submit(lambda _: None, None).result(60)
    with pytest.raises(OperationFailed, match="does not travel"):
        executor.submit(jobs.same, object()).result(60)
    assert executor.capacity >= 2


def test_what_a_job_logs_is_logged_here_with_its_facts(executor, jobs, capsys):
    configure_logging(Logs("warning", "json"))
    with bound({"population": "digits"}):
        executor.submit(jobs.tell, "hello").result(60)
    (line,) = [one for one in map(json.loads, capsys.readouterr().err.splitlines()) if one["logger"] == "jobs"]
    assert (line["message"], line["population"], line["level"]) == ("said hello", "digits", "WARNING")
    assert line["node"]


def test_no_memory_of_ray_holds_what_travels(cluster, executor, jobs):
    """Large enough to pass through the object store, which Ray writes to disk when it is full."""
    marker = os.urandom(1 << 20)
    assert executor.submit(jobs.same, marker).result(60) == marker
    regions = 0
    for pid in descendants(cluster.first):
        for start, end in plasma(pid):
            regions += 1
            with Path(f"/proc/{pid}/mem").open("rb") as memory:
                memory.seek(start)
                assert marker[:64] not in memory.read(end - start)
    assert regions


def plasma(pid):
    """Where a process maps the object store."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "plasma" in line and line.split()[1].startswith("rw"):
            start, _, end = line.split()[0].partition("-")
            yield int(start, 16), int(end, 16)


def test_a_round_of_which_a_node_is_lost_completes_with_every_contribution_once(
    cluster, near, gate, s3, run_server, hand_made, collector, caplog
):
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=100.0, report_goal=8))
    lost = cluster.add()
    server = run_server(
        executor="ray",
        ray_address=cluster.address,
        workers=0,
        blob_url=f"s3://{s3.bucket()}/fedcompute",
        collector_batch_size=2,
        tracing_url=collector.url,
    )
    task_id = server.api.open_task("digits", process, goal=8, room=8)
    contribute([server.api], process, hand_made, "digits", 8)
    wait_until(lambda: gate.waiting >= 2)
    lose(lost)
    gate.opened.set()
    found = server.api.wait_for("digits", task_id, "COMPLETED")
    assert found["assignments"] == {"UPLOAD_COMPLETED": 8}
    state = server.api.checkpoint("digits", task_id, 1)
    np.testing.assert_allclose(state[f"{TRAINABLE}/0"], hand_made.initial[0] - 3.5 * hand_made.rate, atol=1e-6)
    assert [one for one in caplog.messages if "is gone" in one]
    assert sum(one.facts["accepted"] for one in collector.wait("aggregate", 4)) == 8


@pytest.fixture
def start_server(near, s3, postgresql_url, tmp_path):
    """Starts server processes on one PostgreSQL and one object store; returns their URLs, or the process."""
    started = []
    shared = {
        "FEDCOMPUTE_DATABASE_URL": postgresql_url,
        "FEDCOMPUTE_BLOB_URL": f"s3://{s3.bucket()}/fedcompute",
        "FEDCOMPUTE_SECRET": "one secret for all of these servers, long enough",
        "FEDCOMPUTE_UPLOAD_TIMEOUT": "4",
    }

    def run(role, *arguments):
        program = [sys.executable, "-c", "from fedcompute.cli import main; main()", "server", "--json", "--port=0"]
        process = subprocess.Popen(
            [*program, f"--roles={role}", f"--data-dir={tmp_path}/{len(started)}", *arguments],
            stdout=subprocess.PIPE,
            env={**os.environ, **shared},
            text=True,
        )
        started.append(process)
        return process, json.loads(process.stdout.readline())["url"]

    yield run
    for process in started:
        process.terminate()
    for process in started:
        process.wait(30)
        process.stdout.close()


def test_two_servers_for_devices_and_two_engines_on_ray_lose_an_engine_and_no_contribution(
    cluster, gate, start_server, hand_made
):
    process = hand_made.process_of()
    on_ray = ("--executor=ray", f"--ray-address={cluster.address}", "--collector-batch-size=2", "--lease-lifetime=1")
    apis = [hand_made.api_of(start_server("api")[1]) for _ in range(2)]
    engines = [start_server("engine", *on_ray)[0] for _ in range(2)]
    task_id = apis[0].open_task("digits", process, goal=8, room=8)
    contribute(apis, process, hand_made, "digits", 8)
    wait_until(lambda: gate.waiting >= 1)
    engines[0].kill()
    gate.opened.set()
    found = apis[1].wait_for("digits", task_id, "COMPLETED")
    assert found["assignments"] == {"UPLOAD_COMPLETED": 8}
    state = apis[1].checkpoint("digits", task_id, 1)
    np.testing.assert_allclose(state[f"{TRAINABLE}/0"], hand_made.initial[0] - 3.5 * hand_made.rate, atol=1e-6)
    assert engines[1].poll() is None
    for api in apis:
        api.http.close()


def test_a_cluster_that_does_not_answer_is_waited_for(near, jobs):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        executor = open_executor("ray", f"127.0.0.1:{nobody.getsockname()[1]}", 0)
    with pytest.raises(OperationFailed) as refused:
        executor.submit(jobs.pid, None).result(60)
    assert refused.value.reason is Reason.CLUSTER_UNREACHABLE
    woken = threading.Event()
    waiting = Jobs(executor, attempts=1, on_done=woken.set)
    assert waiting.poll(IterationKey("p", 1, 1), jobs.pid, lambda: None) is None
    assert woken.wait(60)
    assert waiting.poll(IterationKey("p", 1, 1), jobs.pid, lambda: None) is None
    assert waiting.sizes().waiting == 1
    executor.close()
    assert executor.submit(jobs.pid, None).cancelled()


def test_workers_are_spread_over_the_cpus_that_are_there():
    nodes = [
        {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus} if cpus else {}}
        for name, alive, cpus in (("a", True, 2.0), ("b", True, 1.0), ("head", True, 0.0), ("lost", False, 8.0))
    ]
    assert lanes_of(nodes, 0) == {"a": 2, "b": 1}
    assert lanes_of(nodes, 2) == {"a": 2, "b": 0}
    assert lanes_of(nodes, 6) == {"a": 4, "b": 2}
    assert lanes_of(nodes[2:], 3) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ray_address": "host:6379", "blob_url": "s3://bucket"}, "ray_address"),
        ({"executor": "ray", "ray_address": "ray://host:10001", "blob_url": "s3://bucket"}, "ray_address"),
        ({"executor": "ray", "ray_address": "host:6379"}, "blob_url"),
        ({"executor": "threads"}, "executor"),
    ],
)
def test_settings_that_no_cluster_could_work_with_are_refused(changes, named):
    with pytest.raises(OperationFailed, match=f"setting {named}"):
        Settings(**changes)
