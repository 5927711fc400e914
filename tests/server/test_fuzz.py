"""Readers of strangers' bytes: a typed error or a result, whatever comes. See `fuzz_targets.py`."""

import importlib.util
import json
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


@pytest.fixture(scope="module")
def follow():
    """Returns follow(log, *arguments) -> exit status of a fuzzer, whose code is instrumented once for all."""
    pytest.importorskip("atheris", reason="atheris, which fuzzes by coverage, is not installed")
    with subprocess.Popen(
        [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:

        def order(log, *arguments):
            one.stdin.write(json.dumps({"log": str(log), "arguments": arguments}) + "\n")
            one.stdin.flush()
            return int(one.stdout.readline())

        yield order


@pytest.mark.parametrize("name", NAMES)
def test_what_coverage_finds_is_read_or_refused_within_its_memory(follow, name, tmp_path):
    limits = [f"-max_total_time={SECONDS}", "-seed=1", f"-rss_limit_mb={MEMORY_MB}", "-timeout=10", "-max_len=8192"]
    status = follow(tmp_path / "log", name, *limits, f"-artifact_prefix={tmp_path}/", str(tmp_path / "corpus"))
    log = (tmp_path / "log").read_text(errors="replace")
    assert status == 0, log[-3000:]
    assert "Done " in log
