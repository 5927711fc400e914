"""Readers of strangers' bytes: a typed error or a result, whatever comes. See `fuzz_targets.py`."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzz_targets.py")
# Of each reader; `FUZZ_SECONDS=600 pytest tests/server/test_fuzz.py` looks longer.
SECONDS = int(os.environ.get("FUZZ_SECONDS", "1"))
MEMORY_MB = 1024
NAMES = [
    "checkpoint", "envelope", "zipped_envelope", "contribution", "partial_sum", "messages", "plan", "proof",
    "attestation", "certificate", "public_keys", "signed_url", "forwarded", "request_head",
]  # fmt: skip


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_targets", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_target_is_fuzzed_and_takes_its_own_seeds(fuzz):
    assert list(fuzz.TARGETS) == NAMES
    for name, seeds in fuzz.SEEDS.items():
        for seed in seeds:
            fuzz.try_one(name, seed)


@pytest.mark.parametrize("name", NAMES)
def test_changed_copies_of_valid_input_are_read_or_refused(fuzz, name):
    for number, data in enumerate(fuzz.mutations(name, 400)):
        try:
            fuzz.try_one(name, data)
        except Exception as error:
            raise AssertionError(f"{name}: mutation {number}, {data!r}") from error


@pytest.mark.parametrize("name", NAMES)
def test_what_coverage_finds_is_read_or_refused_within_its_memory(name, tmp_path):
    pytest.importorskip("atheris", reason="atheris, which fuzzes by coverage, is not installed")
    limits = [f"-max_total_time={SECONDS}", "-seed=1", f"-rss_limit_mb={MEMORY_MB}", "-timeout=10", "-max_len=8192"]
    command = [sys.executable, str(PROGRAM), name, *limits, f"-artifact_prefix={tmp_path}/", str(tmp_path / "corpus")]
    # Through a shell that forks: what starts from here directly counts this process's largest size as its own.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=SECONDS + 120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done " in done.stderr
