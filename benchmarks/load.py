"""What one machine carries: check-ins, uploads, and the time to the next model.

    python benchmarks/load.py [--rate 2000] [--seconds 60] [--places 10000] [--uploads 1000] [--only check-ins]
                              [--json FILE]

Starts a server as users do, with SQLite and blobs in a temporary directory, and sends it the load of `load.c`, which is
compiled when it runs and shares the machine with the server; its own CPU is in the table. Prints tables; asserts
nothing about time.
"""

import argparse
import json
import os
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
from aggregation import LAYERS, PARAMETERS, process_of, update_of
from hardware import machine
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

from fedcompute.crypto.envelope import gzip_bytes, seal_update
from fedcompute.crypto.keys import parse_public_keys
from fedcompute.learning.specification import initial_state
from fedcompute.protos import plan_pb2, task_assignments_pb2, task_pb2
from fedcompute.storage.schema import IterationStatus
from fedcompute.tensors.checkpoint import write_checkpoint

BIN = Path(sys.executable).parent
POPULATION = "benchmark"
PROTO = {"content-type": "application/x-protobuf"}
SECTIONS = ("check-ins", "uploads")


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


@dataclass(frozen=True)
class Answers:
    """Check-ins of one phase with one status: how many, how many a second, and seconds of percentiles.

    `generator`, `server`: shares of a core. `odd`: answers of the phase with another status, and broken connections.
    """

    phase: str
    asked: float | None
    status: int
    count: int
    per_second: float
    percentiles: dict[str, float]
    generator: float
    server: float
    odd: int


def check_ins(load: Load, rate: float, seconds: float, places: int) -> list[Answers]:
    """Devices at a steady rate: a round with places, and once it is full, windows to come back in."""
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
    return [
        *answers_of(f"{rate:g} a second for {seconds:g} s", steady, rate),
        *answers_of("as fast as they come, all places", places_flat_out, None),
        *answers_of("as fast as they come, full", flat_out, None),
    ]


def answers_of(phase: str, found: dict[str, Any], asked: float | None) -> list[Answers]:
    """A phase by status; what is neither 200 nor 201 counts as odd."""
    odd = found["failures"] + sum(n for status, n in found["statuses"].items() if status not in ("200", "201"))
    answers = []
    for kind, status in (("created", 201), ("other", 200)):
        count = found["statuses"].get(str(status), 0)
        if count:
            took = found["created_seconds"] if status == 201 else found["seconds"] - found["created_seconds"]
            answers.append(
                Answers(
                    phase, asked, status, count, count / took, found[kind],
                    found["cpu"] / found["seconds"], found["server_cpu"] / found["seconds"], odd,
                )
            )  # fmt: skip
    return answers


def check_ins_table(answers: list[Answers]) -> Table:
    table = Table(
        "phase", "answers", "asked/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "longest ms", "generator CPU",
        "server CPU", "odd", title=f"check-ins, SQLite, 64 connections kept alive, {os.cpu_count()} cores",
    )  # fmt: skip
    for one in answers:
        table.add_row(
            one.phase, f"{one.count:,} x {one.status}", f"{one.asked:g}" if one.asked else "all",
            f"{one.per_second:,.0f}",
            *(f"{one.percentiles[name] * 1e3:.1f}" for name in ("p50", "p90", "p99", "longest")),
            f"{one.generator:.0%}", f"{one.server:.0%}", str(one.odd),
        )  # fmt: skip
    return table


def check_in_rows(answers: list[Answers]) -> list[Row]:
    kinds = {200: "no place", 201: "a place"}
    return [
        Row(
            "load, check-ins", f"{one.phase}: {kinds[one.status]}", one.per_second, "check-ins/s",
            note=f"p50 {one.percentiles['p50'] * 1e3:.1f} ms, p99 {one.percentiles['p99'] * 1e3:.1f} ms, "
            f"server {one.server:.0%} of a core" + (f", {one.odd} odd answers" if one.odd else ""),
        )
        for one in answers
    ]  # fmt: skip


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


@dataclass(frozen=True)
class Collected:
    """A round of uploads, in seconds; `steps`: from the last upload on, in order. `cpu`: of web server, generator."""

    count: int
    upload_bytes: int
    asked: float
    statuses: dict[str, int]
    seconds: float
    percentiles: dict[str, float]
    cpu: tuple[float, float]
    steps: dict[str, float]

    @property
    def dead_time(self) -> float:
        """From the last sum to the next round's first place: no upload of any device could shorten it."""
        return sum(list(self.steps.values())[2:])


def uploads(load: Load, count: int, rate: float, workers: int) -> Collected:
    """Devices that upload to a round until its goal is met, and how long the server takes from there to the next."""
    with (
        tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name,
        serving(Path(name), f"--workers={workers}") as server,
    ):
        open_task(server, POPULATION, goal=count, room=count, rounds=2)
        body = sealed_update(server)
        paths = sessions(server, POPULATION, count)
        found = load(server, upload_head(len(body)), targets=paths, count=count, rate=rate, connections=16, body=body)
        last = time.time()
        database = sqlite3.connect(f"file:{Path(name) / 'fedcompute.db'}?mode=ro", uri=True)
        wait_until(lambda: len(rounds_of(database)) > 1)
        first, second = rounds_of(database)[:2]
        database.close()
    steps = {}
    for moment, label in (
        (first[int(IterationStatus.AGGREGATING)], "from the last upload to the last batch handed out"),
        (first[int(IterationStatus.APPLYING)], "until every batch is added up"),
        (first[int(IterationStatus.COMPLETED)], "until the model is stored"),
        (second[int(IterationStatus.COLLECTING)], "until the next round takes devices"),
    ):
        steps[label], last = moment - last, moment
    return Collected(
        count, len(body), rate, found["statuses"], found["seconds"], found["other"],
        (found["server_cpu"], found["cpu"]), steps,
    )  # fmt: skip


def uploads_table(found: Collected, workers: int) -> Table:
    table = Table(
        "step", "seconds", title=f"a round of {found.count:,} uploads of {PARAMETERS:,} parameters, {workers} workers"
    )
    table.add_row(f"PUT, {found.upload_bytes / 1e6:.1f} MB each: {found.statuses}", f"{found.seconds:.2f}")
    table.add_row(f"  uploads a second, asked {found.asked:g}", f"{found.count / found.seconds:.1f}")
    table.add_row("  p50 / p99 of one", f"{found.percentiles['p50']:.3f} / {found.percentiles['p99']:.3f}")
    table.add_row("  CPU of the web server / of the load generator", f"{found.cpu[0]:.2f} / {found.cpu[1]:.2f}")
    for label, seconds in found.steps.items():
        table.add_row(label, f"{seconds:.3f}")
    table.add_row("[bold]from the last upload to the next round", f"{sum(found.steps.values()):.3f}")
    return table


def upload_rows(found: Collected, workers: int) -> list[Row]:
    group = f"load, a round of {found.count:,} uploads, {workers} workers"
    asked = f"asked {found.asked:g}" if found.asked else "as fast as they are taken"
    return [
        Row(
            group, f"uploads of {found.upload_bytes / 1e6:.1f} MB, {asked}", found.count / found.seconds, "uploads/s",
            note=f"p50 {found.percentiles['p50'] * 1e3:.0f} ms, p99 {found.percentiles['p99'] * 1e3:.0f} ms, "
            f"{found.cpu[0] / found.count * 1e3:.1f} ms of the web server's CPU for one",
        ),
        Row(group, "from the last upload to the next round", sum(found.steps.values()), "s"),
        Row(group, "of it, from the last sum on", found.dead_time, "s"),
    ]  # fmt: skip


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console = Console(width=max(150, Console().width))
    console.print(f"{machine()}, SQLite {sqlite3.sqlite_version}")
    sections = arguments.only or SECTIONS
    rows: list[Row] = []
    with load_generator() as load:
        if "check-ins" in sections:
            answers = check_ins(load, arguments.rate, arguments.seconds, arguments.places)
            console.print(check_ins_table(answers))
            rows += check_in_rows(answers)
        if "uploads" in sections:
            found = uploads(load, arguments.uploads, arguments.upload_rate, arguments.workers)
            console.print(uploads_table(found, arguments.workers))
            rows += upload_rows(found, arguments.workers)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
