"""What one machine carries: check-ins, uploads, aggregation, and the time to the next model.

    python benchmarks/load.py [--rate 2000] [--seconds 60] [--places 10000] [--uploads 1000] [--only check-ins]

Starts a server as users do, with SQLite and blobs in a temporary directory, and sends it the load of `load.c`, which is
compiled when it runs and shares the machine with the server; its own CPU is in the table. Prints tables; asserts
nothing about time.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from fedcompute.crypto.envelope import gzip_bytes, open_update, seal_update
from fedcompute.crypto.keys import parse_public_keys
from fedcompute.learning.contribution import add, empty_sum, read_contribution
from fedcompute.learning.specification import initial_state, training_process
from fedcompute.protos import learning_pb2, plan_pb2, task_assignments_pb2, task_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

BIN = Path(sys.executable).parent
POPULATION = "benchmark"
PROTO = {"content-type": "application/x-protobuf"}
# The tutorial's convolutional network, layer by layer.
LAYERS = ((3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,), (9216, 128), (128,), (128, 10), (10,))


@dataclass(frozen=True)
class Server:
    """A running server and what it costs."""

    url: str
    process: subprocess.Popen[str]

    def cpu(self) -> float:
        """Seconds of CPU that it has used so far, without its workers."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
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


def process_of(clip_norm: float = 1.0, goal: int = 1000) -> learning_pb2.LearningProcess:
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("", shape, np.dtype(np.float32)) for shape in LAYERS],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.FixedGaussian(clip_norm=clip_norm, noise_multiplier=1.0, report_goal=goal),
        metrics=[],
    )


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
        load(server, check_in_head("nobody", body), rate=500, seconds=1, body=body)
        steady = load(server, check_in_head(POPULATION, body), rate=rate, seconds=seconds, body=body)
        flat_out = load(server, check_in_head(POPULATION, body), seconds=5, body=body)
        open_task(server, "again", goal=places, room=places)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--places", type=int, default=10_000)
    parser.add_argument("--uploads", type=int, default=1000)
    parser.add_argument("--only", choices=["check-ins"])
    arguments = parser.parse_args()
    console = Console(width=max(140, Console().width))
    with load_generator() as load:
        console.print(check_ins(load, arguments.rate, arguments.seconds, arguments.places))


if __name__ == "__main__":
    main()
