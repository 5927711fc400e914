"""What one machine carries: check-ins, uploads, aggregation, and the time to the next model.

    python benchmarks/load.py [--rate 2000] [--seconds 60] [--places 10000] [--uploads 1000] [--only check-ins]

Starts a server as users do, with SQLite and blobs in a temporary directory, and sends it the load of `load.c`, which is
compiled when it runs and shares the machine with the server; its own CPU is in the table. Prints tables; asserts
nothing about time.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from aggregation import LAYERS, PARAMETERS, memory_table, process_of, share_table, update_of
from rich.console import Console
from rich.table import Table

from fedcompute.crypto.envelope import gzip_bytes, seal_update
from fedcompute.crypto.keys import parse_public_keys
from fedcompute.learning.specification import initial_state
from fedcompute.protos import plan_pb2, task_assignments_pb2, task_pb2
from fedcompute.storage.schema import IterationStatus
from fedcompute.tensors.checkpoint import write_checkpoint

BIN = Path(sys.executable).parent
POPULATION = "benchmark"
PROTO = {"content-type": "application/x-protobuf"}
SECTIONS = ("check-ins", "uploads", "aggregation", "memory")


@dataclass(frozen=True)
class Server:
    """A running server and what it costs."""

    url: str
    process: subprocess.Popen[str]

    def cpu(self) -> float:
        """Seconds of CPU that it has used so far, without its workers."""
        return cpu_of(self.process.pid)

    def settle(self) -> None:
        """Waits until its workers have nothing to do: a task that opens prepares its first round."""
        before = -1.0
        while (now := self._cpu_of_workers()) > before:
            before = now
            time.sleep(1)

    def _cpu_of_workers(self) -> float:
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        children = [one for thread in threads for one in (thread / "children").read_text().split()]
        return sum(cpu_of(int(one)) for one in children)


def cpu_of(process: int) -> float:
    """Seconds of CPU that a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(directory: Path, *options: str) -> Iterator[Server]:
    command = [BIN / "fedcompute", "server", "--port=0", f"--data-dir={directory}", "--json", *options]
    process = subprocess.Popen([str(one) for one in command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(json.loads(process.stdout.readline())["listening"], process)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@dataclass(frozen=True)
class Load:
    """The compiled load generator."""

    program: Path

    def __call__(
        self, server: Server, head: str, *, rate: float = 0, seconds: float = 3600, connections: int = 64,
        count: int = 0, targets: list[str] | None = None, body: bytes = b"",
    ) -> dict[str, Any]:  # fmt: skip
        """Sends requests and returns what came back; adds the server's CPU over the same time."""
        place = urlsplit(server.url)
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            (work / "head").write_bytes(head.replace("\n", "\r\n").encode())
            (work / "targets").write_text("\n".join(targets or []))
            (work / "body").write_bytes(body)
            command = [
                self.program, place.hostname, place.port, rate, seconds, connections, count, work / "head",
                work / "targets" if targets else "-", work / "body" if body else "-",
            ]  # fmt: skip
            before = server.cpu()
            found = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=True)
        return json.loads(found.stdout) | {"server_cpu": server.cpu() - before}


@contextmanager
def load_generator() -> Iterator[Load]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("benchmarks/load.py compiles its load generator; install a C compiler (cc)")
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
        program = Path(name) / "load"
        subprocess.run([compiler, "-O2", "-o", program, Path(__file__).with_name("load.c")], check=True)
        yield Load(program)


def open_task(server: Server, population: str, *, goal: int, room: int, rounds: int = 1) -> int:
    """A training task of the tutorial's network without TensorFlow: the server's own parts need none."""
    task = task_pb2.Task(
        total_iteration=rounds, min_aggregation_size=goal, max_aggregation_size=room,
        min_client_version="0", max_client_version="999999999",
    )  # fmt: skip
    task.info.traffic_weight = 100
    task.info.training_info.eligibility_task_info.eligibility_policies.add().min_sep_policy.minimum_separation = 1
    process = process_of()
    weights = [np.zeros(shape, np.float32) for shape in LAYERS]
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process)
    with httpx.Client(timeout=60) as http:
        answer = http.post(
            f"{server.url}/taskmanagement/v1/population/{population}:create-task",
            content=task_pb2.CreateTaskRequest(task=task).SerializeToString(),
            headers=PROTO,
        ).raise_for_status()
        created = task_pb2.CreateTaskResponse.FromString(answer.content).task
        for url, data in (
            (created.init_checkpoint_url[0], write_checkpoint(initial_state(process, weights, ()))),
            (created.server_phase_url[0], gzip_bytes(plan.SerializeToString())),
            (created.client_only_plan_url[0], plan_pb2.ClientOnlyPlan(tflite_graph=b"TFL3").SerializeToString()),
        ):
            http.put(url, content=data).raise_for_status()
        wait_until(lambda: shown(http, server, population, created.task_id)["task"]["status"] == "OPEN")
    return int(created.task_id)


def shown(http: httpx.Client, server: Server, population: str, task_id: int) -> dict[str, Any]:
    answer: dict[str, Any] = http.get(f"{server.url}/api/v1/tasks/{population}/{task_id}").raise_for_status().json()
    return answer


def wait_until(question: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        if time.monotonic() > deadline:
            sys.exit("the server did not get there in time")
        time.sleep(0.005)


def check_in_head(population: str, body: bytes) -> str:
    return (
        f"POST /taskassignment/v1/population/{population}:create-task-assignment HTTP/1.1\n"
        "Host: localhost\n"
        "Content-Type: application/x-protobuf\n"
        f"Content-Length: {len(body)}\n"
        "Accept-Encoding: gzip\n"
        "odp-idempotency-key: 2026-11-01T00:00:00Z - @N-8a6e-0804001c0a00\n"
        "odp-correlation-id: @N\n"
        "fcp-owner-id-digest: dGhlIG93bmVyJ3MgZGlnZXN0IG9mIDMyIGJ5dGVzISEhIQ==\n\n"
    )


def check_in_body() -> bytes:
    request = task_assignments_pb2.CreateTaskAssignmentRequest()
    request.client_version.version_code = "350000000"
    request.resource_capabilities.supported_compression_formats.append(1)
    return request.SerializeToString()


def check_ins(load: Load, rate: float, seconds: float, places: int) -> Table:
    """Devices at a steady rate: a round with places, and once it is full, windows to come back in."""
    table = Table(
        "phase", "answers", "asked/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "longest ms", "generator CPU",
        "server CPU", title=f"check-ins, SQLite, 64 connections kept alive, {os.cpu_count()} cores",
    )  # fmt: skip
    body = check_in_body()
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name, serving(Path(name)) as server:
        open_task(server, POPULATION, goal=places, room=places)
        server.settle()
        load(server, check_in_head("nobody", body), rate=500, seconds=1, body=body)
        steady = load(server, check_in_head(POPULATION, body), rate=rate, seconds=seconds, body=body)
        flat_out = load(server, check_in_head(POPULATION, body), seconds=5, body=body)
        open_task(server, "again", goal=places, room=places)
        server.settle()
        places_flat_out = load(server, check_in_head("again", body), count=places, body=body)
    for label, found, asked in (
        (f"{rate:g} a second for {seconds:g} s", steady, rate),
        ("as fast as they come, all places", places_flat_out, None),
        ("as fast as they come, full", flat_out, None),
    ):
        for kind, status in (("created", "201"), ("other", "200")):
            answers = found["statuses"].get(status, 0)
            if not answers:
                continue
            took = found["created_seconds"] if status == "201" else found["seconds"] - found["created_seconds"]
            times = found[kind]
            table.add_row(
                label, f"{answers:,} x {status}", f"{asked:g}" if asked else "all", f"{answers / took:.0f}",
                *(f"{times[one] * 1e3:.1f}" for one in ("p50", "p90", "p99", "longest")),
                f"{found['cpu'] / found['seconds']:.0%}", f"{found['server_cpu'] / found['seconds']:.0%}",
            )  # fmt: skip
        odd = {one: n for one, n in found["statuses"].items() if one not in ("200", "201")}
        if odd or found["failures"]:
            table.add_row(label, f"{odd}, {found['failures']} broken", *[""] * 8)
    return table


def sessions(server: Server, population: str, count: int) -> list[str]:
    """Devices that have trained: each one's signed path to upload to."""
    body, done = check_in_body(), task_assignments_pb2.ReportResultRequest(result=1).SerializeToString()

    def one(http: httpx.Client) -> str:
        answer = http.post(
            f"{server.url}/taskassignment/v1/population/{population}:create-task-assignment",
            content=body,
            headers=PROTO,
        )
        assert answer.status_code == 201, answer.status_code
        assignment = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(answer.content).task_assignment
        report = http.put(
            f"{server.url}/taskassignment/v1{assignment.self_uri}:report-result", content=done, headers=PROTO
        ).raise_for_status()
        told = task_assignments_pb2.ReportResultResponse.FromString(report.content).upload_instruction
        place = urlsplit(told.upload_location)
        return f"{place.path}?{place.query}"

    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=8)) as http, ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda _: one(http), range(count)))


def sealed_update(server: Server) -> bytes:
    """A device's upload: the checkpoint of an update of random floats, encrypted to the server, as it travels."""
    key = parse_public_keys(httpx.get(f"{server.url}/.well-known/odp/v1/public-keys").raise_for_status().content)[0]
    return gzip_bytes(seal_update(write_checkpoint(update_of(process_of())), key))


def upload_head(size: int) -> str:
    return (
        "PUT @T HTTP/1.1\nHost: localhost\n"
        f"Content-Type: application/octet-stream\nContent-Encoding: gzip\nContent-Length: {size}\n\n"
    )


def uploads(load: Load, count: int, rate: float, workers: int) -> Table:
    """Devices that upload to a round until its goal is met, and how long the server takes from there to the next."""
    table = Table(
        "step", "seconds", title=f"a round of {count:,} uploads of {PARAMETERS:,} parameters, {workers} workers"
    )
    with (
        tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name,
        serving(Path(name), f"--workers={workers}") as server,
    ):
        open_task(server, POPULATION, goal=count, room=count, rounds=2)
        body = sealed_update(server)
        paths = sessions(server, POPULATION, count)
        found = load(server, upload_head(len(body)), targets=paths, count=count, rate=rate, connections=16, body=body)
        ended = time.time()
        database = sqlite3.connect(f"file:{Path(name) / 'fedcompute.db'}?mode=ro", uri=True)
        wait_until(lambda: len(rounds_of(database)) > 1)
        first, second = rounds_of(database)[:2]
        database.close()
    table.add_row(f"PUT, {len(body) / 1e6:.1f} MB each: {found['statuses']}", f"{found['seconds']:.2f}")
    table.add_row(f"  uploads a second, asked {rate:g}", f"{found['answered'] / found['seconds']:.1f}")
    table.add_row("  p50 / p99 of one", f"{found['other']['p50']:.3f} / {found['other']['p99']:.3f}")
    table.add_row("  CPU of the web server / of the load generator", f"{found['server_cpu']:.2f} / {found['cpu']:.2f}")
    last = ended
    for status, label in (
        (IterationStatus.AGGREGATING, "from the last upload to the last batch handed out"),
        (IterationStatus.APPLYING, "until every batch is added up"),
        (IterationStatus.COMPLETED, "until the model is stored"),
    ):
        table.add_row(label, f"{first[int(status)] - last:.3f}")
        last = first[int(status)]
    opened = second[int(IterationStatus.COLLECTING)]
    table.add_row("until the next round takes devices", f"{opened - last:.3f}")
    table.add_row("[bold]from the last upload to the next round", f"{opened - ended:.3f}")
    return table


def rounds_of(database: sqlite3.Connection) -> list[dict[int, float]]:
    """For each round in order the moment at which it last entered each status."""
    rounds: dict[int, dict[int, float]] = {}
    query = "SELECT iteration_id, status, created_time FROM iteration_status_history ORDER BY iteration_id, status_id"
    for iteration_id, status, created in database.execute(query):
        moment = datetime.fromisoformat(created).replace(tzinfo=UTC).timestamp()
        rounds.setdefault(iteration_id, {})[status] = moment
    return [rounds[iteration_id] for iteration_id in sorted(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; all without it")
    parser.add_argument("--rate", type=float, default=2000, help="check-ins a second")
    parser.add_argument("--seconds", type=float, default=60, help="of check-ins")
    parser.add_argument("--places", type=int, default=10_000, help="in the round that they fill")
    parser.add_argument("--uploads", type=int, default=1000, help="in the round that is timed; 4.5 MB of disk each")
    parser.add_argument("--upload-rate", type=float, default=25, help="uploads a second; 0: as fast as they are taken")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the server that takes uploads")
    arguments = parser.parse_args()
    console = Console(width=max(150, Console().width))
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, load before {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}, SQLite {sqlite3.sqlite_version}"
    )
    sections = arguments.only or SECTIONS
    with load_generator() as load:
        if "check-ins" in sections:
            console.print(check_ins(load, arguments.rate, arguments.seconds, arguments.places))
        if "uploads" in sections:
            console.print(uploads(load, arguments.uploads, arguments.upload_rate, arguments.workers))
    if "aggregation" in sections:
        console.print(share_table(count=40))
    if "memory" in sections:
        console.print(memory_table())


if __name__ == "__main__":
    main()
