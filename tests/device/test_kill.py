"""A device is killed before and after each commit: its file is whole, and the next process goes on where it was."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedcompute.device.jobs.flags import put_flag
from fedcompute.device.state import tasks
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import Contribution, record_contribution
from fedcompute.device.state.settings import set_consent

PROGRAM = Path(__file__).with_name("kill_zygote.py")


def _load():
    spec = importlib.util.spec_from_file_location("kill_zygote", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Z = _load()
LATER = Z.NOW + 240_000  # when the next process starts: a run that was cut off is due, one that ended is not


class Zygote:
    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, scenario, file, kill):
        self._process.stdin.write(json.dumps({"scenario": scenario, "file": str(file), "kill": kill}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    yield made
    made.close()


def prepare(scenario, file):
    """The file as the killed process finds it."""
    database = DeviceDatabase(file)
    device = Z.Device(database, scenario, Z.CREATED)
    with database.write() as tx:
        # Only the scenario that is about them has background jobs that are due.
        for name in ("encryption_key_fetch", "delete_expired", "download", "maintenance"):
            due = Z.NOW if scenario == "background cleanup" else Z.NOW + Z.DAY
            tx.execute("INSERT INTO background_job (name, earliest_run) VALUES (?, ?)", (name, due))
    if scenario == "background cleanup":
        with database.write() as tx:
            put_flag(tx, "global_kill_switch", "false")
            old = Contribution(7, "digits", "3", 1, (Z.NOW - 8 * Z.DAY) / 1000)
            record_contribution(tx, old)
            tx.execute("INSERT INTO authorization_token VALUES ('s', 'gone/gone.S', 't', ?)", (Z.NOW - 1,))
            tx.execute("INSERT INTO local_data VALUES ('gone/gone.S-00', 'key', x'00')")
            set_consent(tx, "measurement", False, Z.NOW - Z.DAY)
            record_contribution(tx, Contribution(7, "digits", "3", 2, Z.NOW / 1000))
    elif scenario != "schedule":
        device.schedule(Z.RECURRENT if "recurrent" in scenario else Z.ONE_TIME)
        count = {"counted failure at the limit": 6, "counted failure of a recurrent task": 2}.get(scenario, 0)
        with database.write() as tx:
            tx.execute("UPDATE task SET reschedule_count = ?", (count,))
    database.close()


def resume(scenario, file):
    """A new process, some minutes later; whoever asked for something that was cut off asks again."""
    database = DeviceDatabase(file)
    device = Z.Device(database, scenario, LATER)
    if scenario == "schedule":
        device.schedule()
    elif scenario == "cancel during a run":
        device.cancel()
    device.work()
    return database


def runs(file):
    noted = Path(f"{file}.runs")
    return len(noted.read_text().splitlines()) if noted.exists() else 0


def contributions(tx):
    return tx.execute("SELECT total_participation FROM task_history ORDER BY id").fetchall()


def check(scenario, database, start_cut_off):
    """The end is that of a device which nobody killed, but for a run that began again."""
    with database.read() as tx:
        task, history = tasks.find(tx, Z.JOB), contributions(tx)
        others = tx.execute("SELECT COUNT(*) FROM task WHERE NOT pending").fetchone()[0]
    end = LATER if start_cut_off else Z.NOW
    assert others == 0
    match scenario:
        case "schedule":
            assert (task.pending, task.created in (Z.NOW, LATER)) == (True, True)
            assert task.earliest_run == task.created + 300_000
        case "success of a one-time task":
            assert (task, history) == (None, [(1,)])
        case "success of a recurrent task":
            assert history == [(1,)]
            assert (task.reschedule_count, task.scheduling_reason) == (0, 2)
            assert (task.last_run_end, task.earliest_run) == (end, end + Z.HOUR)
        case "counted failure of a recurrent task":
            assert history == []
            assert (task.reschedule_count, task.last_run_end, task.scheduling_reason) == (3, end, 3)
            assert end + 720_000 <= task.earliest_run <= end + 1_080_000
        case "counted failure at the limit" | "cancel during a run":
            assert (task, history) == (None, [])
        case "background cleanup":
            with database.read() as tx:
                for table in ("authorization_token", "local_data", "task_history", "resumption"):
                    assert tx.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (0,)
                jobs = dict(tx.execute("SELECT name, earliest_run FROM background_job"))
            assert set(jobs) == {"encryption_key_fetch", "delete_expired", "maintenance", "download"}
            for name, due in jobs.items():
                assert due - (Z.DAY // 4 if name == "download" else Z.DAY) in (Z.NOW, LATER)


SCENARIOS = {
    "schedule": 1,
    # Start of the scheduler, start of the run, its end.
    "success of a one-time task": 3,
    "success of a recurrent task": 3,
    "counted failure of a recurrent task": 3,
    "counted failure at the limit": 3,
    "cancel during a run": 4,
    # Start of the scheduler; begin and end of five jobs, of which three have work with a commit.
    "background cleanup": 14,
}


@pytest.fixture(scope="module")
def undisturbed(zygote, tmp_path_factory):
    """The file before each scenario, and what it holds after each commit of it."""
    found = {}
    for scenario in SCENARIOS:
        folder = tmp_path_factory.mktemp("undisturbed")
        prepare(scenario, folder / "before.db")
        shutil.copy(folder / "before.db", folder / "device.db")
        ended = zygote.run(scenario, folder / "device.db", None)
        states = json.loads((folder / "device.db.states").read_text())
        found[scenario] = folder / "before.db", ended, states
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_commit_is_one_that_a_device_is_killed_at_here(undisturbed, scenario):
    _, ended, states = undisturbed[scenario]
    assert ended == {"signal": 0, "commits": SCENARIOS[scenario]}
    assert len(states) == SCENARIOS[scenario] + 1


KILLS = [
    (scenario, number, moment)
    for scenario, commits in SCENARIOS.items()
    for number in range(1, commits + 1)
    for moment in ("before", "after")
]


@pytest.mark.parametrize(("scenario", "number", "moment"), KILLS)
def test_killed_at_a_commit_a_device_loses_nothing_and_does_nothing_twice(
    zygote, undisturbed, tmp_path, scenario, number, moment
):
    before, _, states = undisturbed[scenario]
    file = tmp_path / "device.db"
    shutil.copy(before, file)
    assert zygote.run(scenario, file, [number, moment]) == {"signal": signal.SIGKILL, "commits": 0}

    # Each commit is there as a whole or not at all.
    reached = number if moment == "after" else number - 1
    assert Z.contents(file) == states[reached]
    database = DeviceDatabase(file)
    with database.read() as tx:
        task, history = tasks.find(tx, Z.JOB), contributions(tx)
    database.close()
    cut_off = task is not None and not task.pending
    begun = runs(file)
    assert begun <= 1
    if "success" in scenario:
        ended = task is None or task.last_run_end > 0
        assert (history == [(1,)]) == ended
        assert cut_off == (reached == 2)

    database = resume(scenario, file)
    # The run of a task that has not ended begins again; none that has ended does.
    again = "success" in scenario or "failure" in scenario
    assert runs(file) - begun == (again and (cut_off or reached < 2))
    check(scenario, database, start_cut_off=reached < 3)
    database.close()
