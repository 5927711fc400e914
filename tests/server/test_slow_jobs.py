"""Rounds beside jobs that take long, and what a round asks the store for."""

import gzip
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedcompute.learning.specification import training_process
from fedcompute.protos import learning_pb2, plan_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.server.rounds.aggregate import AggregateJob, aggregate
from fedcompute.server.rounds.update import update
from fedcompute.storage.batches import sum_batches
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.paths import AGGREGATED, GRADIENT, MODEL
from fedcompute.storage.tasks import LIST_LIMIT, create_task
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.tree import LeafSpec

LEAVES, ELEMENTS = 4, 100_000


class OneHeld:
    """An executor of threads; the first job that `holds(job, argument)` ends when the test opens the gate."""

    capacity = 8

    def __init__(self, holds) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._holds = holds
        self._lock = threading.Lock()
        self.reached, self.opened = threading.Event(), threading.Event()
        self.ended = []

    def submit(self, job, argument):
        return self._pool.submit(self._run, job, argument)

    def _run(self, job, argument):
        with self._lock:
            held = not self.reached.is_set() and self._holds(job, argument)
            if held:
                self.reached.set()
        if held:
            assert self.opened.wait(120)
        result = job(argument)
        self.ended.append(job)
        return result

    def warm_up(self):
        pass

    def close(self):
        self.opened.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def one_held():
    made = []

    def make(holds):
        made.append(OneHeld(holds))
        return made[-1]

    yield make
    for one in made:
        one.close()


def body_of(api, hand_made, process, value):
    return api.seal(hand_made.update_of(process, [np.full(leaf.shape, value) for leaf in hand_made.initial]))


def test_a_slow_batch_is_waited_for_though_others_reach_the_goal(run_server, hand_made, one_held, monkeypatch):
    executor = one_held(lambda job, _: job is aggregate)
    running = run_server(executor=executor, collector_batch_size=1)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("patient", process, goal=2, room=3)
    instructions = [api.upload_instruction(api.assignment("patient")) for _ in range(3)]
    bodies = [body_of(api, hand_made, process, value) for value in (1.0, 2.0, 6.0)]
    context = running.app.state.context
    # None is seen before all three are there.
    with monkeypatch.context() as unseen:
        unseen.setattr(context.uploads, "all", set)
        for one, body in zip(instructions, bodies, strict=True):
            assert api.upload(one, body).status_code == 200
    context.wake()
    assert executor.reached.wait(60)
    api.wait(lambda: executor.ended.count(aggregate) == 2)
    api.wait_for("patient", task_id, "AGGREGATING", iteration=1)

    def aggregated():
        with context.database.read() as tx:
            return sum_batches(tx, IterationKey("patient", task_id, 1)).aggregated

    api.wait(lambda: aggregated() == 2)
    # Two make the goal; the third device has done its work too.
    time.sleep(2)
    assert update not in executor.ended
    executor.opened.set()
    found = api.wait_for("patient", task_id, "COMPLETED")
    assert found["assignments"] == {"UPLOAD_COMPLETED": 3}
    state = api.checkpoint("patient", task_id, 1)["server/global_model_weights/trainable/0"]
    np.testing.assert_allclose((hand_made.initial[0] - state) / hand_made.rate, np.full((3, 2), 3.0), atol=1e-5)


def test_a_round_whose_update_takes_long_delays_no_other(run_server, hand_made, one_held):
    executor = one_held(lambda job, argument: job is update and argument.key.population == "slow")
    api, process = run_server(executor=executor).api, hand_made.process_of()
    tasks = {name: api.open_task(name, process, goal=1, rounds=2) for name in ("slow", "fast")}
    body = body_of(api, hand_made, process, 1.0)
    api.contribute("slow", body=body)
    assert executor.reached.wait(60)
    for iteration in (1, 2):
        api.contribute("fast", body=body)
        api.wait_for("fast", tasks["fast"], "COMPLETED", iteration=iteration)
    assert api.task("slow", tasks["slow"])["iterations"][0]["status"] == "APPLYING"
    executor.opened.set()
    api.wait_for("slow", tasks["slow"], "COMPLETED", iteration=1)


def test_a_job_that_takes_longer_than_a_lease_lives_is_done_once(run_server, hand_made, one_held, postgresql_url):
    executors = [one_held(lambda job, _: job is aggregate) for _ in range(2)]
    shared = {"database_url": postgresql_url, "lease_lifetime": 2.0}
    first, second = (run_server(executor=one, **shared) for one in executors)
    process = hand_made.process_of()
    task_id = first.api.open_task("long", process, goal=1)
    first.api.contribute("long", body=body_of(first.api, hand_made, process, 1.0))
    first.api.wait(lambda: any(one.reached.is_set() for one in executors))
    time.sleep(5)
    assert [one.reached.is_set() for one in executors].count(True) == 1
    for one in executors:
        one.opened.set()
    second.api.wait_for("long", task_id, "COMPLETED")
    assert sum(one.ended.count(aggregate) for one in executors) == 1


def test_a_task_behind_more_than_a_page_of_others_opens_and_completes(run_server, hand_made):
    running = run_server()
    with running.app.state.context.database.write() as tx:
        for number in range(LIST_LIMIT + 1):
            others = task_pb2.Task(
                population_name=f"before-{number:04}",
                total_iteration=1,
                min_aggregation_size=1,
                max_aggregation_size=1,
                min_client_version="0",
                max_client_version="9",
            )
            create_task(tx, others, now())
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("last", process, goal=1, within=90)
    api.contribute("last", body=body_of(api, hand_made, process, 1.0))
    api.wait(lambda: api.task("last", task_id)["task"]["status"] == "COMPLETED", 90)


def test_no_folder_is_listed_to_find_uploads_and_sums(run_server, hand_made, monkeypatch):
    running = run_server(collector_batch_size=2)
    api, process = running.api, hand_made.process_of()
    store = type(running.app.state.context.blobs)
    listed, listing = [], store.list

    def noted(self, bucket, *arguments, **options):
        listed.append(bucket)
        return listing(self, bucket, *arguments, **options)

    monkeypatch.setattr(store, "list", noted)
    task_id = api.open_task("told", process, goal=6, rounds=2)
    body = body_of(api, hand_made, process, 1.0)
    for iteration in (1, 2):
        for _ in range(6):
            api.contribute("told", body=body)
        api.wait_for("told", task_id, "COMPLETED", iteration=iteration)
    assert set(listed) & {GRADIENT, AGGREGATED} == set()


def test_the_memory_of_a_batch_does_not_grow_with_its_uploads(tmp_path):
    process = training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec(f"{number}", (ELEMENTS,), np.dtype(np.float32)) for number in range(LEAVES)],
        non_trainable=(),
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.UniformMean(),
        metrics=[],
    )
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process).SerializeToString()
    leaves = {}
    for leaf in process.updates:
        kind = np.int32 if leaf.role == learning_pb2.UpdateLeaf.COUNT else np.float32
        leaves[leaf.spec.name] = np.ones([dim.size for dim in leaf.spec.shape.dim], kind)
    blobs = open_blob_store(tmp_path.as_uri())
    blobs.put(MODEL, "plan", gzip.compress(plan))
    blobs.put(GRADIENT, "update", gzip.compress(write_checkpoint(leaves)))

    def peak(count):
        job = AggregateJob(
            blob_url=tmp_path.as_uri(),
            plan_path="plan",
            client_checkpoint_path="none",
            uploads=tuple((f"{number}", "update") for number in range(count)),
            output_path=f"sum-of-{count}",
            max_upload_bytes=1 << 24,
            max_checkpoint_bytes=1 << 24,
            allow_plaintext=True,
            private_keys={},
        )
        tracemalloc.start()
        try:
            assert aggregate(job).accepted == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    # The 24 uploads between them have 38 MB.
    assert peak(30) - peak(6) < LEAVES * ELEMENTS * 4
