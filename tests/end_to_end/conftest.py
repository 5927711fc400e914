"""A real server on a thread of the test process, on a free loopback port."""

import threading
import time
from contextlib import contextmanager

import pytest

from fedcompute.app import server
from fedcompute.cli.server import listen
from fedcompute.server.settings import RetryWindow, Settings

SOON = RetryWindow(0.02, 0.05)


@contextmanager
def _serving(directory, executor=None):
    listener = listen("127.0.0.1", 0)
    settings = Settings(
        data_dir=directory,
        port=listener.getsockname()[1],
        retry_no_task=SOON,
        retry_no_active_task=SOON,
        workers=1,
    )
    running = server(settings, executor)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield settings
    finally:
        running.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving():
    """`with serving(directory) as settings:` runs a server over that data directory."""
    return _serving
