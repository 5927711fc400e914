"""Every state that the doctor knows, made for real, and a healthy server that it leaves alone."""

import os
import shutil
import socket
import sqlite3
import threading
from datetime import timedelta

import numpy as np
import pytest

from fedcompute.protos import learning_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.server.doctor.examination import examine
from fedcompute.server.doctor.findings import Limits, Patient
from fedcompute.server.rounds.aggregate import aggregate
from fedcompute.server.rounds.update import update
from fedcompute.storage import schema
from fedcompute.storage.leases import acquire_lease


@pytest.fixture
def start(run_server):
    def run(executor=None, **settings):
        return run_server(executor, **{"retention_period": 0.0, **settings})

    return run


@pytest.fixture
def look():
    """Examines a server's stores as they will look so much later; returns the findings by their code."""

    def run(server, limits=None, **later):
        context = server.app.state.context
        patient = Patient(context.settings, context.database, context.blobs, now() + timedelta(**later))
        return {one.code: one for one in examine(patient, limits)}

    return run


@pytest.fixture
def give(hand_made):
    def run(server, process, population, count=1):
        for _ in range(count):
            deltas = [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]
            server.api.contribute(population, hand_made.update_of(process, deltas))

    return run


def blob(server, *parts):
    return server.settings.data_dir.joinpath("blobs", *map(str, parts))


def test_nothing_is_found_wherever_a_round_stands(start, hand_made, look, give, make_gate):
    gate = make_gate(update)
    server = start(gate)
    assert look(server) == {}
    process = hand_made.process_of()
    task_id = server.api.open_task("healthy", process, goal=2, rounds=2)
    assert look(server) == {}
    give(server, process, "healthy")
    assert look(server) == {}
    give(server, process, "healthy")
    assert gate.reached.wait(30)
    assert look(server) == {}
    gate.opened.set()
    server.api.wait_for("healthy", task_id, "COMPLETED", iteration=1)
    assert look(server) == {}
    give(server, process, "healthy", count=2)
    server.api.wait_for("healthy", task_id, "COMPLETED")
    assert look(server) == {}
    assert look(server, days=5).keys() == set()


def test_a_task_whose_artifacts_never_came_is_found(start, look):
    server = start()
    task = server.api.create_task("empty")
    assert look(server, minutes=59) == {}
    found = look(server, hours=2)["task_without_artifacts"]
    assert found.subject == f"empty/{task.task_id}"
    assert "client-only plan, server plan, initial checkpoint" in found.what
    assert found.numbers["seconds"] == pytest.approx(7200, abs=60)


def test_a_failed_task_is_found_until_another_follows(start, hand_made, look):
    server = start()
    task = server.api.create_task("failing")
    for url in (task.init_checkpoint_url[0], task.server_phase_url[0], task.client_only_plan_url[0]):
        server.api.http.put(url, content=b"\x0ajunk")
    server.api.wait_for("failing", task.task_id, "FAILED")
    found = look(server)["task_failed"]
    assert found.numbers == {"reason": "plan_malformed"}
    assert "build the plan again" in found.remedy
    server.api.open_task("failing", hand_made.process_of())
    assert look(server) == {}


def test_a_round_with_too_few_devices_is_found_with_its_numbers(start, hand_made, look, give):
    server = start()
    process = hand_made.process_of()
    server.api.open_task("sparse", process, goal=3)
    give(server, process, "sparse")
    server.api.wait(lambda: server.api.task("sparse", 1)["assignments"].get("UPLOAD_COMPLETED"))
    assert "round_below_goal" not in look(server, hours=23)
    found = look(server, hours=25)["round_below_goal"]
    assert (found.numbers["contributions"], found.numbers["goal"]) == (1, 3)
    server.api.http.post(f"{server.api.url}/taskmanagement/v1/population/sparse/tasks/1:pause")
    assert "round_below_goal" not in look(server, hours=25)


@pytest.mark.parametrize(
    ("job", "codes"),
    [
        (aggregate, {"round_stuck_aggregating", "batch_under_way_for_long"}),
        (update, {"round_stuck_applying"}),
    ],
)
def test_a_round_that_is_added_up_or_applied_for_long_is_found(start, hand_made, look, give, make_gate, job, codes):
    gate = make_gate(job)
    server = start(gate)
    process = hand_made.process_of()
    server.api.open_task("stuck", process, goal=2)
    give(server, process, "stuck", count=2)
    assert gate.reached.wait(30)
    server.api.wait(lambda: server.api.task("stuck", 1)["iterations"][0]["status"] != "COLLECTING")
    assert look(server, minutes=14).keys() & codes == set()
    found = look(server, minutes=16)
    assert found.keys() >= codes
    for code in codes:
        assert found[code].numbers["seconds"] > 15 * 60


def test_what_no_engine_does_is_found(start, hand_made, look, give):
    server = start()
    process = hand_made.process_of()
    server.api.open_task("left", process, goal=2, room=9)
    server.api.assignment("left")
    server.api.upload_instruction(server.api.assignment("left"))
    give(server, process, "left")
    server.api.wait(lambda: server.api.task("left", 1)["assignments"].get("UPLOAD_COMPLETED"))
    server.stop()
    context = server.app.state.context
    with context.database.write() as tx:
        # As if a second upload had been collected by an engine that died before it made the batch.
        waiting = schema.assignment.c.status == 1
        tx.execute(schema.assignment.update().where(waiting).values(status=2))
    found = look(server, hours=1)
    assert found["assignments_overdue"].numbers["assignments"] == 1
    assert found["uploads_not_batched"].numbers["uploads"] == 2
    with context.database.write() as tx:
        tx.execute(schema.iteration.update().values(status=101))
    assert look(server, hours=1)["task_without_round"].subject == "left/1"


def test_an_evaluation_that_waits_for_a_model_is_healthy(start, hand_made, look):
    server = start()
    training = hand_made.process_of()
    trained = server.api.open_task("waited", training, goal=1)
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_task_id = trained
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    server.api.open_task("waited", hand_made.evaluation_of(training, []), goal=1, info=info)
    assert "task_without_round" not in look(server, hours=20)


def test_leases_of_the_dead_are_found_and_expired_ones_removed(start, look):
    server = start()
    database = server.app.state.context.database
    host = socket.gethostname()[:20]
    with database.write() as tx:
        dead = 4_194_304 + 7  # above the largest number that Linux gives
        assert acquire_lease(tx, "held", f"{host}/{dead}/abc", now(), timedelta(minutes=5))
        assert acquire_lease(tx, "mine", f"{host}/{os.getpid()}/abc", now(), timedelta(hours=9))
        assert acquire_lease(tx, "elsewhere", f"no-such-host/{dead}/abc", now(), timedelta(hours=9))
    found = look(server)
    assert (found["lease_of_dead_process"].subject, len(found)) == ("held", 1)
    found = look(server, minutes=30)["leases_expired"]
    assert (found.subject, found.numbers["leases"]) == ("held", 1)
    found.fix()
    assert look(server, minutes=30) == {}


@pytest.mark.parametrize("lost", ["checkpoint", "client_checkpoint", "server_phase", "upload"])
def test_an_object_that_rows_refer_to_and_the_store_lost_is_found(start, hand_made, look, give, lost):
    server = start()
    process = hand_made.process_of()
    task_id = server.api.open_task("lossy", process, goal=2, rounds=2)
    give(server, process, "lossy", count=2)
    server.api.wait_for("lossy", task_id, "COMPLETED", iteration=1)
    give(server, process, "lossy")
    server.api.wait(lambda: server.api.task("lossy", task_id)["assignments"].get("UPLOAD_COMPLETED") == 3)
    (upload,) = blob(server, "gradient", "lossy", task_id, 2, "d").iterdir()
    path = {
        "checkpoint": blob(server, "model", "lossy", task_id, 1, "s", 0, "checkpoint"),
        "client_checkpoint": blob(server, "model", "lossy", task_id, 1, "d", 0, "client_checkpoint"),
        "server_phase": blob(server, "model", "lossy", task_id, 0, "s", 0, "server_phase"),
        "upload": upload / "gradient",
    }[lost]
    assert look(server) == {}
    path.unlink()
    found = look(server)
    assert found.keys() == {"object_missing"}
    assert found["object_missing"].subject.endswith(path.name)


def test_a_store_that_lost_everything_is_one_finding_more_than_twenty(start, hand_made, look, give):
    server = start()
    process = hand_made.process_of()
    for number in range(8):
        server.api.open_task(f"wrong-{number}", process)
    shutil.rmtree(blob(server, "model"))
    context = server.app.state.context
    found = examine(Patient(context.settings, context.database, context.blobs, now()))
    assert [one.code for one in found] == ["object_missing"] * 20 + ["objects_missing"]
    assert found[-1].numbers == {"objects": 32}


def test_objects_that_no_row_knows_are_found_and_removed_when_asked(start, hand_made, look, give):
    server = start()
    process = hand_made.process_of()
    task_id = server.api.open_task("tidy", process, goal=1, rounds=2)
    give(server, process, "tidy")
    server.api.wait_for("tidy", task_id, "COMPLETED", iteration=1)
    junk = {
        "upload_without_row": blob(server, "gradient", "tidy", task_id, 1, "d", "nobody", "gradient"),
        "sum_without_row": blob(server, "aggregated", "tidy", task_id, 1, "s", 0, 0, "nobody", "gradient"),
        "object_without_task": blob(server, "model", "gone", 9, 0, "s", 0, "checkpoint"),
    }
    for path in junk.values():
        path.parent.mkdir(parents=True)
        path.write_bytes(b"junk")
    before = blob(server, "model", "tidy", task_id, 1, "s", 0, "checkpoint").read_bytes()
    found = look(server)
    assert found.keys() == junk.keys()
    for one in found.values():
        assert one.numbers == {"objects": 1}
        one.fix()
    assert look(server) == {}
    assert not any(path.exists() for path in junk.values())
    assert blob(server, "model", "tidy", task_id, 1, "s", 0, "checkpoint").read_bytes() == before


def test_objects_of_somebody_else_are_found_and_never_removed(start, look):
    server = start()
    path = blob(server, "gradient", "holiday.jpg")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"junk")
    found = look(server)
    assert found.keys() == {"object_unknown"}
    assert found["object_unknown"].fix is None


def test_what_comes_back_after_retention_is_found_and_removed_when_asked(start, hand_made, look, give):
    from fedcompute.server.retention import Retention

    server = start()
    process = hand_made.process_of()
    task_id = server.api.open_task("late", process, goal=1)
    give(server, process, "late")
    server.api.wait_for("late", task_id, "COMPLETED")
    (upload,) = blob(server, "gradient", "late", task_id, 1, "d").iterdir()
    context = server.app.state.context
    Retention(context.database, context.blobs, context.settings).look(now() + timedelta(days=2))
    assert look(server) == {}
    upload.mkdir(parents=True)
    (upload / "gradient").write_bytes(b"late")
    found = look(server)
    assert found.keys() == {"object_left_over"}
    found["object_left_over"].fix()
    assert look(server) == {}


def test_secrets_that_lie_open_or_do_not_open_are_found(start, look):
    server = start()
    secret = server.settings.data_dir / "secret"
    secret.chmod(0o644)
    found = look(server)["secret_readable"]
    assert found.numbers == {"mode": "644"}
    found.fix()
    assert look(server) == {}

    kept = secret.read_bytes()
    secret.write_bytes(b"A" * 44)
    assert look(server).keys() == {"secret_unreadable"}
    secret.unlink()
    assert look(server).keys() == {"secret_missing"}
    assert not secret.exists()
    secret.write_bytes(kept)
    secret.chmod(0o600)
    with server.app.state.context.database.write() as tx:
        tx.execute(schema.server_secret.update().values(sealed_with=None))
    assert look(server).keys() == {"secrets_unsealed"}


def test_a_data_directory_that_others_may_enter_is_found_and_closed_when_asked(start, look):
    server = start()
    server.settings.data_dir.chmod(0o755)
    found = look(server)
    assert found.keys() == {"data_readable"}
    found["data_readable"].fix()
    assert look(server) == {}
    assert server.settings.data_dir.stat().st_mode & 0o777 == 0o750


def test_a_key_that_runs_out_is_found_while_a_task_needs_it(start, hand_made, look):
    server = start()
    assert look(server, days=13.5) == {}
    server.api.open_task("keyed", hand_made.process_of())
    found = look(server, Limits(collecting=1e9), days=13.5)
    assert found["keys_running_out"].numbers["seconds"] == pytest.approx(43_200, abs=300)


def test_a_ledger_that_was_changed_is_found(start, hand_made, look, give):
    server = start()
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=0.5, report_goal=1))
    task_id = server.api.open_task("ledger", process, goal=1)
    give(server, process, "ledger")
    server.api.wait_for("ledger", task_id, "COMPLETED")
    assert look(server) == {}
    with server.app.state.context.database.write() as tx:
        tx.execute(schema.privacy_ledger.update().values(contributions=99))
    found = look(server)
    assert found.keys() == {"ledger_broken"}
    assert "was changed" in found["ledger_broken"].what


def test_a_budget_that_is_nearly_spent_is_found(start, hand_made, look, give):
    server = start()
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=1))
    task_id = server.api.open_task("spent", process, goal=1)
    give(server, process, "spent")
    server.api.wait_for("spent", task_id, "COMPLETED")
    url = f"{server.api.url}/api/v1/populations/spent/budget"
    for epsilon, codes in ((1e6, set()), (5.0, {"budget_nearly_spent"})):
        budget = {"epsilon": epsilon, "delta": 1e-6, "assumption": "NO_AMPLIFICATION"}
        assert server.api.http.put(url, json=budget).status_code == 200
        assert look(server).keys() == codes


def test_a_full_disk_and_a_clock_that_went_back_are_found(start, hand_made, look):
    server = start()
    server.api.open_task("timed", hand_made.process_of())
    assert look(server, Limits(free_bytes=1 << 60)).keys() == {"disk_nearly_full"}
    found = look(server, hours=-1)["clock_skew"]
    assert found.numbers["seconds"] == pytest.approx(3600, abs=60)


def test_a_store_that_fails_is_a_finding_and_the_rest_is_examined(start, hand_made, look):
    server = start()
    server.api.create_task("half")
    context = server.app.state.context
    secret = server.settings.data_dir / "secret"
    secret.chmod(0o644)

    # A directory that cannot be listed cannot be made by root, whom the tests may run as.
    class Broken:
        def __getattr__(self, name):
            return getattr(context.blobs, name)

        def list(self, *_, **__):
            from fedcompute.errors import OperationFailed, Reason

            raise OperationFailed(Reason.STORAGE_FAILED, "the store could not list model: GenericError")

    patient = Patient(context.settings, context.database, Broken(), now())
    found = {one.code: one for one in examine(patient)}
    assert found.keys() == {"not_examined", "secret_readable"}
    assert found["not_examined"].subject == "objects"


def test_rows_without_their_parents_are_found(start, look):
    server = start()
    file = server.settings.data_dir / "fedcompute.db"
    with sqlite3.connect(file) as connection:  # which does not enforce foreign keys
        connection.execute("INSERT INTO task_status_history VALUES ('nobody', 1, 0, 0, '2026-01-01 00:00:00.000000')")
    found = look(server)
    assert found.keys() == {"database_damaged"}
    assert "task_status_history" in found["database_damaged"].what


def test_a_server_on_postgresql_is_examined_alike(start, hand_made, look, give, postgresql_url):
    server = start(database_url=postgresql_url)
    process = hand_made.process_of()
    task_id = server.api.open_task("pg", process, goal=1, rounds=2)
    give(server, process, "pg")
    server.api.wait_for("pg", task_id, "COMPLETED", iteration=1)
    assert look(server) == {}
    assert look(server, hours=25).keys() == {"round_below_goal"}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_nothing_is_found_while_rounds_come_and_go(start, hand_made, look, give, request, kind):
    url = {"database_url": request.getfixturevalue("postgresql_url")} if kind == "postgresql" else {}
    server = start(collector_batch_size=2, **url)
    process = hand_made.process_of()
    task_id = server.api.open_task("busy", process, goal=3, rounds=6)
    done = threading.Event()

    def work():
        for number in range(1, 7):
            give(server, process, "busy", count=3)
            server.api.wait_for("busy", task_id, "COMPLETED", iteration=number)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    looks = 0
    while not done.is_set() or not looks:
        looks += 1
        assert look(server) == {}
    worker.join(60)
    assert looks > 1
