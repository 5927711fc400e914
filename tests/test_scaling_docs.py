"""The arithmetic of docs/scaling.md is that of benchmarks/arithmetic.py, from this release's settings."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedcompute.server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def arithmetic():
    """The script as a module; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("arithmetic", ROOT / "benchmarks" / "arithmetic.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_tables_of_the_page_are_what_the_script_prints(arithmetic):
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page == arithmetic.updated(page, arithmetic.document(arithmetic.Inputs())), (
        "python benchmarks/arithmetic.py --update docs/scaling.md"
    )


def test_the_assumptions_that_are_defaults_of_the_server_are_its_defaults(arithmetic):
    inputs, settings = arithmetic.Inputs(), Settings()
    window = settings.retry_no_task
    assert (inputs.shortest_wait, inputs.longest_wait) == (window.minimum, window.maximum)
    assert inputs.keep_updates_days == settings.keep_updates_days


def test_a_laptop_s_first_bottleneck_is_the_disk_for_updates(arithmetic):
    inputs = arithmetic.Inputs()
    found = arithmetic.carried(inputs, arithmetic.stages(inputs)[0])
    # 200 GB of updates of 1.2 million parameters, each kept for a day and a half.
    assert min(found, key=found.get) == "disk for updates"
    assert found["disk for updates"] == pytest.approx(200e9 / (1_199_882 * 3.75 * 1.5))


def test_what_devices_need_grows_as_their_number_and_what_a_stage_carries_does_not(arithmetic):
    one = arithmetic.Inputs()
    two = replace(one, devices=2 * one.devices)
    for name in ("asked", "places", "uploaded", "downloaded", "aggregation_seconds", "message_seconds"):
        assert getattr(two, name) == pytest.approx(2 * getattr(one, name)), name
    for stage in arithmetic.stages(one):
        assert arithmetic.carried(two, stage) == pytest.approx(arithmetic.carried(one, stage))
