"""Trees of metrics files, as a server leaves them."""

import json

import pytest


@pytest.fixture
def write_round():
    """Returns write(root, task, round, values or raw bytes): one metrics file in the layout of a bucket."""

    def write(root, task, number, values):
        path = root / task / str(number) / "s" / "0" / "metrics"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(values if isinstance(values, bytes) else json.dumps(values).encode())

    return write
