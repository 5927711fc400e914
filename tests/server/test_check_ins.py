import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event

from fedcompute.errors import OperationFailed, Reason
from fedcompute.protos import task_assignments_pb2
from fedcompute.server.rounds.check_ins import CheckIns
from fedcompute.storage.check_ins import CheckIn


def count_commits(context):
    seen = Counter()

    def begun(connection):
        seen[connection.get_execution_options()["fedcompute_write"]] += 1

    event.listen(context.database._engine, "begin", begun)  # the only place that sees every transaction
    return seen


def ask(context, check_ins, seconds=30.0):
    """Answers check-ins that come at one moment; exceptions are answers too."""

    async def run():
        desk = CheckIns(context)
        try:
            return await asyncio.gather(*(desk.answer(one, seconds) for one in check_ins), return_exceptions=True)
        finally:
            desk.close()

    return asyncio.run(run())


def places(answers):
    return [one.task_assignment.assignment_id for one in answers if one.HasField("task_assignment")]


def test_devices_that_come_while_a_transaction_runs_share_the_next_one(run_server, hand_made):
    server = run_server()
    server.api.open_task("crowd", hand_made.process_of(), goal=40, room=40)
    context = server.app.state.context
    commits = count_commits(context)
    answers = ask(context, [CheckIn("crowd", 1, f"key {index}") for index in range(60)])
    assert len(set(places(answers))) == 40
    assert Counter(one.WhichOneof("result") for one in answers) == {"task_assignment": 40, "rejection_info": 20}
    assert commits[True] <= 3  # and not 60; the round engine may have had one or two


def test_a_full_round_costs_no_write_and_a_freed_place_is_given_at_once(run_server, hand_made):
    server = run_server()
    server.api.open_task("full", hand_made.process_of(), goal=1, room=2)
    first = server.api.assignment("full")
    server.api.assignment("full")
    context = server.app.state.context
    assert not places(ask(context, [CheckIn("full", 1)]))
    commits = count_commits(context)
    for _ in range(3):
        assert not places(ask(context, [CheckIn("full", 1) for _ in range(20)]))
    # A sweep of the round engine may fall into this moment.
    assert commits[True] <= 1
    server.api.report(first, task_assignments_pb2.ReportResultRequest.FAILED)
    assert len(places(ask(context, [CheckIn("full", 1) for _ in range(20)]))) == 1


def test_a_check_in_that_cannot_be_stored_costs_only_itself(run_server, hand_made):
    server = run_server()
    server.api.open_task("mixed", hand_made.process_of(), goal=5, room=10)
    bad = CheckIn("mixed", 1, "\ud800")  # no text that could be hashed
    answers = ask(server.app.state.context, [CheckIn("mixed", 1, "a"), bad, CheckIn("mixed", 1, "b")])
    assert isinstance(answers[1], UnicodeEncodeError)
    assert len(set(places([answers[0], answers[2]]))) == 2


def test_a_check_in_is_answered_in_time_when_the_database_is_not(run_server, hand_made):
    server = run_server()
    server.api.open_task("stuck", hand_made.process_of(), goal=5, room=10)
    context = server.app.state.context
    held, done = threading.Event(), threading.Event()

    def hold():
        with context.database.write():
            held.set()
            done.wait(60)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(30)
        try:
            answers = ask(context, [CheckIn("stuck", 1, f"{index}") for index in range(3)], seconds=1.5)
        finally:
            done.set()
    for answer in answers:
        assert isinstance(answer, OperationFailed)
        assert answer.reason in (Reason.SERVER_BUSY, Reason.STORAGE_FAILED)
    # Nobody took a place that nobody knows of.
    assert len(places(ask(context, [CheckIn("stuck", 1) for _ in range(12)]))) == 10


@pytest.mark.parametrize("count", [1, 7])
def test_every_device_of_a_round_is_told_the_same_but_its_own_name(run_server, hand_made, count):
    server = run_server()
    server.api.open_task("alike", hand_made.process_of(), goal=5, room=10)
    answers = ask(server.app.state.context, [CheckIn("alike", 1) for _ in range(count)])
    told = [one.task_assignment for one in answers]
    for one in told:
        assert one.self_uri.endswith(f"/aggregation/1/task-assignment/{one.assignment_id}")
    assert len({one.self_uri for one in told}) == count
    assert len({(one.plan.uri, one.init_checkpoint.uri, one.task_name) for one in told}) == 1
