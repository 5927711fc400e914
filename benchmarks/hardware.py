"""What this machine can do at most: memory, ciphers, checksums, unpacking, disk. Other figures stand beside these.

    python benchmarks/hardware.py [--repeats 7] [--directory DIR]

One core, by the libraries that the server uses, in the sizes of its uploads. Medians of several runs; asserts nothing
about time. `--directory` says which disk is meant; it takes 128 MiB there for a while.
"""

import argparse
import gzip
import hashlib
import mmap
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import google_crc32c
import numpy as np
import pybase64
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from isal import isal_zlib
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

GROUP = "hardware, one core"
UPDATE = 4_799_528  # bytes of 1,199,882 float32: the tutorial's network
LARGE = 32_000_000  # float64 that fit no cache: 256 MB
FILE = 128 << 20
FSYNCS = 50


def machine() -> str:
    """This machine in a line: processor, cores, memory, kernel, versions, moment, and how busy it is."""
    processors = re.findall(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    parts = [
        processors[0] if processors else platform.processor() or platform.machine(),
        f"{os.cpu_count()} cores",
        f"{int(memory[1]) / (1 << 20):.0f} GiB" if memory else "memory unknown",
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
        *(f"{name} {_version(package)}" for name, package in (("NumPy", "numpy"), ("TensorFlow", "tensorflow"))),
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"load before {os.getloadavg()[0]:.1f}",
    ]
    return ", ".join(parts)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds, after one run that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def processor_rows(repeats: int) -> list[Row]:
    """Memory, ciphers, checksums, unpacking."""
    generator = np.random.default_rng(0)
    large, total = generator.random(LARGE), np.zeros(LARGE)
    update = (generator.standard_normal(UPDATE // 4) * 5e-4).astype(np.float32)
    small, sums = update.copy(), np.zeros(update.size)
    data, nonce = update.tobytes(), bytes(12)
    chacha, aes = ChaCha20Poly1305(bytes(32)), AESGCM(bytes(32))
    chacha_sealed, aes_sealed = chacha.encrypt(nonce, data, b""), aes.encrypt(nonce, data, b"")
    packed, encoded = gzip.compress(data, 6, mtime=0), pybase64.b64encode(data)
    text = gzip.compress(encoded, 6, mtime=0)

    def inflate(body: bytes) -> bytes:
        return isal_zlib.decompressobj(wbits=31).decompress(body, 2 * UPDATE)

    works: list[tuple[str, int, Callable[[], object], str]] = [
        ("memory: NumPy copy, 256 MB", 16 * LARGE, lambda: np.copyto(total, large), "bytes read and written"),
        ("memory: NumPy float64 add, 256 MB", 24 * LARGE, lambda: np.add(total, large, total), "likewise"),
        ("NumPy float64 += float32, an update", UPDATE, lambda: np.add(sums, small, sums), "of the update, 4.8 MB"),
        ("ChaCha20-Poly1305, decrypt", UPDATE, lambda: chacha.decrypt(nonce, chacha_sealed, b""), ""),
        ("AES-256-GCM, decrypt", UPDATE, lambda: aes.decrypt(nonce, aes_sealed, b""), ""),
        ("SHA-256", UPDATE, lambda: hashlib.sha256(data).digest(), ""),
        ("CRC32C", UPDATE, lambda: google_crc32c.value(data), ""),
        ("base64, decode", len(encoded), lambda: pybase64.b64decode(encoded, validate=True), "of the text"),
        ("inflate, an update", UPDATE, lambda: inflate(packed), f"of what comes out; packed to {_part(packed, data)}"),
        ("inflate, base64 of random bytes", len(encoded), lambda: inflate(text), f"packed to {_part(text, encoded)}"),
    ]
    return [Row(GROUP, name, size / timed(work, repeats) / 1e9, "GB/s", note=note) for name, size, work, note in works]


def _part(packed: bytes, data: bytes) -> str:
    return f"{len(packed) / len(data):.0%}"


def disk_rows(directory: Path, repeats: int) -> list[Row]:
    """The disk of `directory`, and its files in the page cache."""
    block = np.random.default_rng(0).bytes(1 << 20)
    path = directory / "file"

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(FILE // len(block)):
                file.write(block)
            os.fsync(file.fileno())

    def sync() -> None:
        with path.open("r+b", buffering=0) as file:
            for _ in range(FSYNCS):
                file.seek(0)
                file.write(block[:4096])
                os.fsync(file.fileno())

    def read() -> None:
        buffer = memoryview(bytearray(1 << 20))
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def read_mapped() -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            array = np.frombuffer(mapped, np.uint64)
            array.max()
            del array

    disk = min(3, repeats)
    return [
        Row("disk", "written and fsynced, 128 MiB", FILE / timed(write, disk) / 1e6, "MB/s"),
        Row("disk", "fsyncs of 4 KiB", FSYNCS / timed(sync, disk), "fsyncs/s"),
        Row("disk", "page cache, read", FILE / timed(read, repeats) / 1e9, "GB/s", note="one core"),
        Row("disk", "page cache, mapped and read", FILE / timed(read_mapped, repeats) / 1e9, "GB/s", note="one core"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where to write; default: that of temporary files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console = Console()
    console.print(machine())
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-", dir=arguments.directory) as name:
        rows = [*processor_rows(arguments.repeats), *disk_rows(Path(name), arguments.repeats)]
    table = Table("what", "figure", "", title="hardware")
    for row in rows:
        table.add_row(row.name, f"{row.value:,.2f} {row.unit}", row.note)
    console.print(table)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
