"""How much of the hardware's speed aggregation reaches, and how much memory it takes.

    python benchmarks/aggregation.py [--uploads 40]

Stored uploads of the tutorial's network go through the job that workers run: read, unpack, decrypt, unpack, check, add.
Beside it, in turns and in the same processes, the least that any server does with them: inflate twice, base64 and
ChaCha20-Poly1305 by the same libraries. Prints tables; asserts nothing about time.
"""

import argparse
import base64
import gzip
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pybase64
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from isal import isal_zlib
from rich.console import Console
from rich.table import Table

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.crypto.hpke import DEVICE_INFO, open_sealed, seal
from fedcompute.crypto.keys import generate_key_pair
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import initial_state, training_process
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.server.rounds.aggregate import AggregateJob, aggregate
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.paths import GRADIENT, MODEL
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.tree import LeafSpec

LIMIT = 64 << 20
KINDS = 8  # different uploads; each is read many times
# The tutorial's convolutional network, layer by layer.
LAYERS = ((3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,), (9216, 128), (128,), (128, 10), (10,))
PARAMETERS = sum(math.prod(shape) for shape in LAYERS)


def process_of(clip_norm: float = 1.0, goal: int = 1000) -> learning_pb2.LearningProcess:
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("", shape, np.dtype(np.float32)) for shape in LAYERS],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.FixedGaussian(clip_norm=clip_norm, noise_multiplier=1.0, report_goal=goal),
        metrics=[],
    )


def update_of(process: learning_pb2.LearningProcess, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    leaves: dict[str, np.ndarray[Any, Any]] = {}
    for leaf in process.updates:
        shape = [dim.size for dim in leaf.spec.shape.dim]
        if leaf.role == learning_pb2.UpdateLeaf.COUNT:
            leaves[leaf.spec.name] = np.array(1, np.int32)
        else:
            scale = 5e-4 if leaf.role == learning_pb2.UpdateLeaf.DELTA else 0.0
            leaves[leaf.spec.name] = (generator.standard_normal(shape) * scale).astype(np.float32)
    return leaves


@dataclass(frozen=True)
class Stored:
    """Uploads in a blob store, and the job that adds them up."""

    job: AggregateJob
    bodies: tuple[bytes, ...]


@dataclass(frozen=True)
class Cost:
    """Seconds for one upload: of the clock, and of the CPU."""

    wall: float
    cpu: float


def store_uploads(directory: Path, level: int) -> Stored:
    """Writes a plan and sealed uploads, packed by zlib's `level` as devices do: 6 is Java's default, 1 is Python's."""
    store = open_blob_store(directory.as_uri())
    process = process_of()
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process)
    store.put(MODEL, "plan", gzip_bytes(plan.SerializeToString()))
    state = initial_state(process, [np.zeros(shape, np.float32) for shape in LAYERS], ())
    store.put(MODEL, "client", gzip_bytes(write_checkpoint(client_checkpoint(process, state))))
    key = generate_key_pair(datetime.now(UTC), timedelta(days=1))
    bodies = []
    for seed in range(KINDS):
        packed = gzip.compress(write_checkpoint(update_of(process, seed)), level, mtime=0)
        payload = base64.b64encode(seal(key.public_key, packed, DEVICE_INFO)).decode()
        document = {"keyId": key.id, "encryptedPayload": payload, "associatedData": "e30="}
        bodies.append(gzip.compress(json.dumps(document).encode(), level, mtime=0))
        store.put(GRADIENT, f"{seed}", bodies[-1])
    job = AggregateJob(
        blob_url=directory.as_uri(), plan_path="plan", client_checkpoint_path="client", uploads=(), output_path="sum",
        max_upload_bytes=LIMIT, max_checkpoint_bytes=LIMIT, allow_plaintext=False,
        private_keys={key.id: key.private_key},
    )  # fmt: skip
    return Stored(job, tuple(bodies))


def add_up(stored: Stored, count: int) -> None:
    """What a worker does with a batch of `count` uploads."""
    uploads = tuple((str(index), str(index % KINDS)) for index in range(count))
    result = aggregate(replace(stored.job, uploads=uploads, output_path=f"sum-{os.getpid()}"))
    assert result.accepted == count, result.rejected[:1]


def measure(stored: Stored, count: int, repetitions: int) -> list[tuple[Cost, Cost]]:
    """Costs of an upload on the worker's path and on the shortest one, in turns."""
    (private_key,) = stored.job.private_keys.values()
    cipher, nonce = ChaCha20Poly1305(bytes(32)), bytes(12)
    parts = []
    for body in stored.bodies:
        payload = json.loads(gzip.decompress(body))["encryptedPayload"].encode()
        packed = open_sealed(private_key, base64.b64decode(payload), DEVICE_INFO)
        parts.append((body, payload, cipher.encrypt(nonce, packed, b"")))

    def only_unpack() -> None:
        for index in range(count):
            body, payload, encrypted = parts[index % KINDS]
            isal_zlib.decompressobj(wbits=31).decompress(body, LIMIT)
            pybase64.b64decode(payload, validate=True)
            isal_zlib.decompressobj(wbits=31).decompress(cipher.decrypt(nonce, encrypted, b""), LIMIT)

    def cost(work: Any) -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return Cost((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)

    add_up(stored, 2)
    return [(cost(lambda: add_up(stored, count)), cost(only_unpack)) for _ in range(repetitions)]


def share_table(count: int) -> Table:
    """The two paths on one core and on all, for uploads that phones and that Python devices packed."""
    table = Table(
        "packed by", "cores", "uploads/s", "unpacking alone/s", "share", "CPU ms", "unpacking CPU ms", "share of CPU",
        title=f"encrypted uploads of {PARAMETERS:,} parameters: read, decrypt, check and sum in batches of {count}",
    )  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    for level, packer in ((6, "zlib 6, as phones"), (1, "zlib 1")):
        with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
            stored = store_uploads(Path(name), level)
            for cores in sorted({1, os.cpu_count() or 1}):
                with ProcessPoolExecutor(cores, spawn) as pool:
                    runs = [pool.submit(measure, stored, count, 5) for _ in range(cores)]
                    costs = [pair for run in runs for pair in run.result()]
                full = Cost(*(statistics.median(getattr(one, name) for one, _ in costs) for name in ("wall", "cpu")))
                least = Cost(*(statistics.median(getattr(one, name) for _, one in costs) for name in ("wall", "cpu")))
                table.add_row(
                    packer, str(cores), f"{cores / full.wall:.1f}", f"{cores / least.wall:.1f}",
                    f"{least.wall / full.wall:.0%}", f"{full.cpu * 1e3:.1f}", f"{least.cpu * 1e3:.1f}",
                    f"{least.cpu / full.cpu:.0%}",
                )  # fmt: skip
    return table


def memory_table() -> Table:
    """The largest memory of a worker process by the number of uploads in its batch."""
    table = Table(
        "uploads in a batch", "largest memory, MB", title=f"one aggregation worker, {PARAMETERS:,} parameters"
    )
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
        stored = store_uploads(Path(name), 6)
        for count in (1, 10, 100, 1000):
            with ProcessPoolExecutor(1, spawn) as pool:
                table.add_row(f"{count:,}", f"{pool.submit(peak, stored, count).result() / 1024:.0f}")
    return table


def peak(stored: Stored, count: int) -> int:
    """KiB of the largest resident set of this process after adding `count` uploads up."""
    add_up(replace(stored, bodies=()), count)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uploads", type=int, default=40, help="in a batch")
    arguments = parser.parse_args()
    console = Console(width=max(130, Console().width))
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, NumPy {np.__version__}"
    )
    console.print(share_table(arguments.uploads))
    console.print(memory_table())


if __name__ == "__main__":
    main()
