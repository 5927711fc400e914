import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.executors import ProcessExecutor


@pytest.fixture
def executor():
    pool = ProcessExecutor(1)
    yield pool
    pool.close()


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A module that worker processes can import too."""
    (tmp_path / "worker_jobs.py").write_text(
        "import os, signal, pathlib\n"
        "def pid(_): return os.getpid()\n"
        "def fail(text): raise ValueError(text)\n"
        "def refuse(remedy):\n"
        "    from fedcompute.errors import ArtifactInvalid, Reason\n"
        "    raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, 'no', remedy=remedy)\n"
        "def die_once(marker):\n"
        "    path = pathlib.Path(marker)\n"
        "    if path.exists(): return 'survived'\n"
        "    path.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def die(_): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import worker_jobs

    yield worker_jobs
    del sys.modules["worker_jobs"]


def test_a_job_runs_in_another_process(executor, jobs):
    assert executor.submit(jobs.pid, None).result(60) != os.getpid()


def test_a_job_that_raises_gives_its_error_and_the_pool_goes_on(executor, jobs):
    with pytest.raises(OperationFailed, match="no luck"):
        executor.submit(jobs.fail, "no luck").result(60)
    assert executor.submit(jobs.pid, None).result(60)


def test_an_error_keeps_its_reason_and_its_remedy(executor, jobs):
    with pytest.raises(OperationFailed) as refused:
        executor.submit(jobs.refuse, "install it").result(60)
    assert (refused.value.reason, refused.value.remedy) == (Reason.PLAN_UNSUPPORTED, "install it")


def test_a_job_whose_worker_is_killed_runs_again(executor, jobs, tmp_path):
    assert executor.submit(jobs.die_once, str(tmp_path / "marker")).result(60) == "survived"


def test_a_job_that_kills_every_worker_ends_with_an_error(executor, jobs):
    with pytest.raises(OperationFailed, match="died"):
        executor.submit(jobs.die, None).result(60)
    assert executor.submit(jobs.pid, None).result(60)


def test_workers_end_with_a_parent_that_is_killed(jobs, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from fedcompute.server.executors import ProcessExecutor\n"
        "import worker_jobs\n"
        "if __name__ == '__main__':\n"
        "    print(ProcessExecutor(1).submit(worker_jobs.pid, None).result(60), flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_close_leaves_no_worker_behind(jobs):
    pool = ProcessExecutor(1)
    worker = pool.submit(jobs.pid, None).result(60)
    pool.close()
    assert not _alive(worker)
    assert pool.submit(jobs.pid, None).cancelled()
