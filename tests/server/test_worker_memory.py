import platform
import resource
import subprocess
import sys

import pytest

from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.worker_memory import keep_freed_memory

_MANY = """
import platform, resource
{setting}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(48 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
_KEEP = "from fedcompute.server.worker_memory import keep_freed_memory; keep_freed_memory()"
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory can be told so")


def faults_of(setting: str) -> int:
    answer = subprocess.run(
        [sys.executable, "-c", _MANY.format(setting=setting)], check=True, capture_output=True, text=True, timeout=60
    )
    return int(answer.stdout)


@needs_glibc
def test_a_block_that_was_freed_is_taken_again_without_a_new_page():
    pages = (48 << 20) // resource.getpagesize()
    assert faults_of("") > pages / 20
    assert faults_of(_KEEP) < pages / 100


@needs_glibc
def test_workers_keep_what_they_free():
    executor = ProcessExecutor(1)
    try:
        assert [executor.submit(_faults, 48 << 20).result(60) for _ in range(3)][-1] < 100
    finally:
        executor.close()


def test_elsewhere_nothing_is_set(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def _faults(size: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
