"""What a pass costs: it looks at rounds with something to do, however many others there are."""

import threading
import time
from dataclasses import replace

import pytest
from sqlalchemy import event

from fedcompute.protos import learning_pb2
from fedcompute.server.context import Uploads
from fedcompute.server.rounds.jobs import Jobs
from fedcompute.server.rounds.passes import Passes
from fedcompute.storage.keys import IterationKey


@pytest.fixture
def questions(run_server, make_gate, hand_made):
    """Returns ask(population) -> statements of a pass; every call opens some more rounds that collect."""
    running = run_server()
    context = running.app.state.context
    # As another engine on the same database has it: the server's own has a thread of its own.
    second = replace(context, jobs=Jobs(make_gate(None), 1, lambda: None), uploads=Uploads(), prepared={})
    passes, mine, asked = Passes(second), threading.get_ident(), []

    @event.listens_for(context.database._engine, "before_cursor_execute")
    def _count(connection, cursor, statement, *rest):
        if threading.get_ident() == mine and statement not in ("BEGIN", "BEGIN IMMEDIATE"):
            asked.append(statement)

    def ask(*populations, aggregator=None):
        for population in populations:
            running.api.open_task(population, hand_made.process_of(aggregator), goal=2)
        # Until what is found out once is known.
        deadline = time.monotonic() + 60
        keys = {IterationKey(population, 1, 1) for population in populations}
        while not keys <= second.prepared.keys() and time.monotonic() < deadline:
            passes()
            time.sleep(0.02)
        passes._next_sweep = passes._next_summary = float("inf")
        asked.clear()
        passes()
        return len(asked)

    return ask


@pytest.mark.parametrize(
    "aggregator", [None, learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=2)]
)
def test_a_pass_over_many_rounds_that_wait_for_devices_asks_no_more_than_one_over_one(questions, aggregator):
    alone = questions("first", aggregator=aggregator)
    assert questions("second", "third", "fourth", "fifth", aggregator=aggregator) == alone
