"""How much of the hardware's speed aggregation reaches, how its cost grows, and how much memory it takes.

    python benchmarks/aggregation.py [--uploads 40] [--only plaintext] [--json FILE]

Stored uploads of the tutorial's network go through the job that workers run. Plaintext checkpoints are read out of the
page cache, their checksums and values checked, and added to a float64 sum or to the lattice sum of differential
privacy; beside it a plain NumPy float64 sum of the same arrays, which lie in memory already. Encrypted uploads are
read, unpacked, decrypted, unpacked, checked and added; beside it the least that any server does with them: inflate
twice, base64 and ChaCha20-Poly1305 by the same libraries. Both sides take turns in the same processes. Prints tables;
asserts nothing about time.
"""

import argparse
import base64
import gzip
import json
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pybase64
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hardware import machine
from isal import isal_zlib
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.crypto.hpke import DEVICE_INFO, open_sealed, seal
from fedcompute.crypto.keys import generate_key_pair
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import initial_state, training_process
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.server.rounds.aggregate import AggregateJob, aggregate
from fedcompute.server.worker_memory import keep_freed_memory
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.paths import GRADIENT, MODEL
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

LIMIT = 256 << 20
SECTIONS = ("plaintext", "encrypted", "linear", "memory")
KINDS = 8  # different uploads; each is read many times
# The tutorial's convolutional network, layer by layer.
LAYERS = ((3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,), (9216, 128), (128,), (128, 10), (10,))
PARAMETERS = sum(math.prod(shape) for shape in LAYERS)

Layers = tuple[tuple[int, ...], ...]


def process_of(
    clip_norm: float | None = 1.0, goal: int = 1000, layers: Layers = LAYERS
) -> learning_pb2.LearningProcess:
    """FedAvg with a fixed Gaussian mechanism; without a clip norm the plain mean."""
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("", shape, np.dtype(np.float32)) for shape in layers],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.UniformMean()
        if clip_norm is None
        else learning_pb2.FixedGaussian(clip_norm=clip_norm, noise_multiplier=1.0, report_goal=goal),
        metrics=[],
    )


def update_of(process: learning_pb2.LearningProcess, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    parameters = sum(math.prod(dim.size for dim in leaf.shape.dim) for leaf in process.trainable)
    leaves: dict[str, np.ndarray[Any, Any]] = {}
    for leaf in process.updates:
        shape = [dim.size for dim in leaf.spec.shape.dim]
        if leaf.role == learning_pb2.UpdateLeaf.COUNT:
            leaves[leaf.spec.name] = np.array(1, np.int32)
        else:
            scale = 0.5 / math.sqrt(parameters) if leaf.role == learning_pb2.UpdateLeaf.DELTA else 0.0
            leaves[leaf.spec.name] = (generator.standard_normal(shape) * scale).astype(np.float32)
    return leaves


@dataclass(frozen=True)
class Stored:
    """Different uploads in a blob store, and the job that adds them up."""

    job: AggregateJob
    kinds: int
    parameters: int
    upload_bytes: int


@dataclass(frozen=True)
class Cost:
    """Seconds for one upload: of the clock, and of the CPU."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Measured:
    """What a job of so many contributions costs on each of `cores`, beside the least that has to be done: medians."""

    upload: str
    total: str
    floor: str
    cores: int
    parameters: int
    contributions: int
    upload_bytes: int
    cost: Cost
    least: Cost

    @property
    def per_second(self) -> float:
        """Contributions a second on all cores together."""
        return self.cores / self.cost.wall

    @property
    def bytes_per_second(self) -> float:
        """Bytes of stored uploads a second on all cores together."""
        return self.per_second * self.upload_bytes

    @property
    def least_per_second(self) -> float:
        return self.cores / self.least.wall

    @property
    def share(self) -> float:
        return self.least.wall / self.cost.wall

    @property
    def share_of_cpu(self) -> float:
        return self.least.cpu / self.cost.cpu


def store_uploads(
    directory: Path, level: int | None, clip_norm: float | None = 1.0, layers: Layers = LAYERS, kinds: int = KINDS
) -> Stored:
    """Writes a plan and uploads: sealed, packed by zlib's `level` (6 is Java's default, 1 Python's), or plaintext."""
    store = open_blob_store(directory.as_uri())
    process = process_of(clip_norm, layers=layers)
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process)
    store.put(MODEL, "plan", gzip_bytes(plan.SerializeToString()))
    state = initial_state(process, [np.zeros(shape, np.float32) for shape in layers], ())
    store.put(MODEL, "client", gzip_bytes(write_checkpoint(client_checkpoint(process, state))))
    key = generate_key_pair(datetime.now(UTC), timedelta(days=1))
    size = 0
    for seed in range(kinds):
        body = write_checkpoint(update_of(process, seed))
        if level is not None:
            sealed = seal(key.public_key, gzip.compress(body, level, mtime=0), DEVICE_INFO)
            payload = base64.b64encode(sealed).decode()
            document = {"keyId": key.id, "encryptedPayload": payload, "associatedData": "e30="}
            body = gzip.compress(json.dumps(document).encode(), level, mtime=0)
        store.put(GRADIENT, f"{seed}", body)
        size = len(body)
    job = AggregateJob(
        blob_url=directory.as_uri(), plan_path="plan", client_checkpoint_path="client", uploads=(), output_path="sum",
        max_upload_bytes=LIMIT, max_checkpoint_bytes=LIMIT, allow_plaintext=level is None,
        private_keys={key.id: key.private_key},
    )  # fmt: skip
    return Stored(job, kinds, sum(math.prod(shape) for shape in layers), size)


def add_up(stored: Stored, count: int) -> None:
    """What a worker does with a batch of `count` uploads."""
    uploads = tuple((str(index), str(index % stored.kinds)) for index in range(count))
    result = aggregate(replace(stored.job, uploads=uploads, output_path=f"sum-{os.getpid()}"))
    assert result.accepted == count, result.rejected[:1]


def only_sum(stored: Stored, count: int) -> Callable[[], None]:
    """A plain NumPy float64 sum of the arrays of `count` uploads, which lie in memory."""
    store = open_blob_store(stored.job.blob_url)
    arrays = [
        [leaf.copy() for leaf in read_checkpoint(store.get(GRADIENT, str(kind), LIMIT)).values() if leaf.ndim]
        for kind in range(stored.kinds)
    ]

    def work() -> None:
        totals = [np.zeros(leaf.shape) for leaf in arrays[0]]
        for index in range(count):
            for total, leaf in zip(totals, arrays[index % stored.kinds], strict=True):
                total += leaf

    return work


def only_unpack(stored: Stored, count: int) -> Callable[[], None]:
    """Inflates, decodes, decrypts and inflates `count` uploads, which lie in memory, and does nothing else."""
    store = open_blob_store(stored.job.blob_url)
    (private_key,) = stored.job.private_keys.values()
    cipher, nonce = ChaCha20Poly1305(bytes(32)), bytes(12)
    parts = []
    for kind in range(stored.kinds):
        body = store.get(GRADIENT, str(kind), LIMIT)
        payload = json.loads(gzip.decompress(body))["encryptedPayload"].encode()
        packed = open_sealed(private_key, base64.b64decode(payload), DEVICE_INFO)
        parts.append((body, payload, cipher.encrypt(nonce, packed, b"")))

    def work() -> None:
        for index in range(count):
            body, payload, encrypted = parts[index % stored.kinds]
            isal_zlib.decompressobj(wbits=31).decompress(body, LIMIT)
            pybase64.b64decode(payload, validate=True)
            isal_zlib.decompressobj(wbits=31).decompress(cipher.decrypt(nonce, encrypted, b""), LIMIT)

    return work


def measure(stored: Stored, count: int, repetitions: int) -> list[tuple[Cost, Cost]]:
    """Costs of an upload in the worker's job and of the least, in turns."""
    least = (only_sum if stored.job.allow_plaintext else only_unpack)(stored, count)

    def cost(work: Callable[[], None]) -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return Cost((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)

    add_up(stored, 2)
    return [(cost(lambda: add_up(stored, count)), cost(least)) for _ in range(repetitions)]


def measured(stored: Stored, upload: str, total: str, *, cores: int, count: int, repetitions: int) -> Measured:
    """Measures in `cores` fresh processes at a time."""
    # As the server's workers; it serves both sides.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), initializer=keep_freed_memory) as pool:
        runs = [pool.submit(measure, stored, count, repetitions) for _ in range(cores)]
        costs = [pair for run in runs for pair in run.result()]
    full, least = (
        Cost(*(statistics.median(getattr(pair[side], name) for pair in costs) for name in ("wall", "cpu")))
        for side in (0, 1)
    )
    floor = "NumPy float64 sum in memory" if stored.job.allow_plaintext else "inflate, base64, decrypt alone"
    return Measured(upload, total, floor, cores, stored.parameters, count, stored.upload_bytes, full, least)


def plaintext(count: int = 500, repetitions: int = 5) -> list[Measured]:
    """Checkpoints in the page cache, into float64 and onto the lattice, on one core and on all."""
    return [
        found
        for clip_norm, total in ((None, "float64"), (1.0, "lattice"))
        for found in _by_cores("plaintext", total, None, clip_norm, count, repetitions)
    ]


def encrypted(count: int = 40, repetitions: int = 5) -> list[Measured]:
    """Uploads as phones and as Python devices pack them, onto the lattice, on one core and on all."""
    return [
        found
        for level, packer in ((6, "encrypted, zlib 6 as phones"), (1, "encrypted, zlib 1"))
        for found in _by_cores(packer, "lattice", level, 1.0, count, repetitions)
    ]


def _by_cores(
    upload: str, total: str, level: int | None, clip_norm: float | None, count: int, times: int
) -> list[Measured]:
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
        stored = store_uploads(Path(name), level, clip_norm)
        return [
            measured(stored, upload, total, cores=cores, count=count, repetitions=times)
            for cores in sorted({1, os.cpu_count() or 1})
        ]


def linear(repetitions: int = 3) -> list[Measured]:
    """Plaintext checkpoints into float64 on one core: models of several sizes, jobs of 10 to 10,000 contributions."""
    found = []
    for layers, kinds, counts in (
        (((784, 62), (62,)), KINDS, (10, 100, 1_000, 10_000)),
        (LAYERS, KINDS, (10, 100, 1_000)),
        (((10_000, 1_000), (1_000,)), 3, (10, 100)),
    ):
        with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
            stored = store_uploads(Path(name), None, None, layers, kinds)
            found += [
                measured(stored, "plaintext", "float64", cores=1, count=count, repetitions=repetitions)
                for count in counts
            ]
    return found


def table_of(rows: Sequence[Measured], title: str) -> Table:
    table = Table(
        "upload", "sum", "parameters", "job of", "cores", "uploads/s", "GB/s", "ms", "beside it", "uploads/s", "share",
        "share of CPU", title=title,
    )  # fmt: skip
    for one in rows:
        table.add_row(
            one.upload, one.total, f"{one.parameters:,}", f"{one.contributions:,}", str(one.cores),
            f"{one.per_second:,.1f}", f"{one.bytes_per_second / 1e9:.2f}", f"{one.cost.wall * 1e3:.3f}", one.floor,
            f"{one.least_per_second:,.1f}", f"{one.share:.0%}", f"{one.share_of_cpu:.0%}",
        )  # fmt: skip
    return table


def rows_of(found: Sequence[Measured], group: str) -> list[Row]:
    """The rows of `make bench`."""
    return [
        Row(
            group,
            f"{one.upload} into {one.total}, {one.parameters:,} parameters, job of {one.contributions:,}, "
            f"{one.cores} core{'s' * (one.cores > 1)}",
            one.per_second, "contributions/s", f"{one.floor}, {one.least_per_second:,.1f}/s", one.share,
            f"{one.bytes_per_second / 1e9:.2f} GB/s; {one.share_of_cpu:.0%} by CPU time",
        )
        for one in found
    ]  # fmt: skip


def memory() -> dict[int, float]:
    """The largest memory of a worker process, in MB, by the number of uploads in its job."""
    found = {}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
        stored = store_uploads(Path(name), 6)
        for count in (1, 10, 100, 1000):
            with ProcessPoolExecutor(1, spawn, initializer=keep_freed_memory) as pool:
                found[count] = pool.submit(peak, stored, count).result() / 1024
    return found


def memory_table(peaks: Mapping[int, float]) -> Table:
    table = Table("uploads in a job", "largest memory, MB", title=f"one worker, {PARAMETERS:,} parameters, encrypted")
    for count, megabytes in peaks.items():
        table.add_row(f"{count:,}", f"{megabytes:.0f}")
    return table


def peak(stored: Stored, count: int) -> int:
    """KiB of the largest resident set of this process after adding `count` uploads up."""
    add_up(stored, count)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uploads", type=int, default=40, help="in a job of encrypted ones")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; all without it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console = Console(width=max(170, Console().width))
    console.print(machine())
    sections = arguments.only or SECTIONS
    rows: list[Row] = []
    for section, measure_all, title in (
        ("plaintext", plaintext, "plaintext checkpoints out of the page cache: read, check and sum"),
        ("encrypted", partial(encrypted, arguments.uploads), "encrypted uploads: read, decrypt, check and sum"),
        ("linear", linear, "cost by contributions and model size, the job's own work included"),
    ):
        if section in sections:
            found = measure_all()
            console.print(table_of(found, title))
            rows += rows_of(found, "aggregation" if section != "linear" else "aggregation, cost is linear")
    if "memory" in sections:
        peaks = memory()
        console.print(memory_table(peaks))
        rows += [
            Row("aggregation", f"memory of a worker, job of {count:,} encrypted", megabytes, "MB")
            for count, megabytes in peaks.items()
        ]
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
