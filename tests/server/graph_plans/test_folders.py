import os
import signal
import stat
import subprocess
import sys
import tempfile

import pytest

from fedcompute.server.graph_plans.folders import private_folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_gone_afterwards(root):
    with private_folder() as folder:
        (folder / "update").write_bytes(b"secret")
        assert all(stat.S_IMODE(one.stat().st_mode) == 0o700 for one in (folder, folder.parent))
    assert list(root.iterdir()) == []


def test_a_folder_is_gone_after_an_error(root):
    def fail():
        with private_folder() as folder:
            (folder / "update").write_bytes(b"secret")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert list(root.iterdir()) == []


def test_a_folder_in_use_stays(root):
    with private_folder() as folder, private_folder() as other:
        assert folder.is_dir()
        assert other.is_dir()


def test_what_a_killed_process_left_behind_is_removed(root):
    script = """
import sys, time
from fedcompute.server.graph_plans.folders import private_folder
with private_folder() as folder:
    (folder / "update").write_bytes(b"secret")
    print(folder, flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "TMPDIR": str(root)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline().startswith(str(root).encode())
    with private_folder():
        assert len(list(root.iterdir())) == 2
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert len(list(root.iterdir())) == 1
    with private_folder():
        assert len(list(root.iterdir())) == 1
    assert list(root.iterdir()) == []
