"""Servers for tests of pages: those of the server's own tests, with hand-made plans and devices."""

import importlib.util
import sys
from pathlib import Path

import pytest


def _parts():
    name = "server_test_parts"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "server" / "conftest.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def hand_made():
    """What the server's tests make by hand: processes, plans, updates."""
    return _parts().HandMade()


@pytest.fixture(scope="module")
def start_server():
    """`start(data_dir, **settings)` runs a server; its `.api` is a client, `.settings.base_url` its address."""
    started = []

    def start(data_dir, **changes):
        started.append(_parts().Running(_parts().settings_of(data_dir, **changes)))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="module")
def api(start_server, tmp_path_factory):
    """One server for a whole test file; every test takes a population of its own."""
    return start_server(tmp_path_factory.mktemp("data")).api
