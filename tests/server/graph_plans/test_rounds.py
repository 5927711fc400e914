"""Whole rounds of plans with server graphs: the real engine behind real HTTP, graphs in its worker process."""

import math

import numpy as np
import pytest

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.device.developer.examples import training_example
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.errors import Reason
from fedcompute.protos import plan_pb2, task_pb2
from fedcompute.server.graph_plans import plan as graph_plan
from fedcompute.server.graph_plans.plan import open_graph_plan
from fedcompute.server.rounds.plans import read_server_plan
from fedcompute.server.rounds.spending import Spending
from fedcompute.server.rounds.sums import SumGroup
from fedcompute.server.rounds.update import UpdateJob, update
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.paths import AGGREGATED, MODEL
from fedcompute.storage.releases import Standing
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

# The first graph waits for TensorFlow to load in the worker.
SECONDS = 120


def create(api, population, server_plan, client_plan, checkpoint, **options):
    """A task with the given artifacts, once its server has judged them."""
    task = api.create_task(population, **options)
    for url, data in (
        (task.init_checkpoint_url[0], checkpoint),
        (task.server_phase_url[0], gzip_bytes(server_plan)),
        (task.client_only_plan_url[0], client_plan),
    ):
        assert api.http.put(url, content=data).status_code == 200
    found = api.wait(lambda: status(api, population, task.task_id, *["OPEN", "FAILED", "COMPLETED"]), SECONDS)
    return task.task_id, found


def status(api, population, task_id, *wanted):
    found = api.task(population, task_id)
    return found if found["task"]["status"] in wanted else None


def finished(api, population, task_id, iteration):
    def reached():
        found = api.task(population, task_id)
        rounds = {one["iteration_id"]: one["status"] for one in found["iterations"]}
        return found if rounds.get(iteration) == "COMPLETED" else None

    return api.wait(reached, SECONDS)


def told(api, population, seconds=SECONDS):
    """What one device is told: its assignment and its client checkpoint's bytes."""
    assignment = api.assignment(population, seconds)
    response = api.http.get(assignment.init_checkpoint.uri)
    assert response.status_code == 200
    return assignment, response.content


def give(api, assignment, leaves):
    response = api.upload(api.upload_instruction(assignment), api.seal(leaves))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("form", ["one_graph", "two_graphs"])
def test_two_rounds_end_with_the_model_that_the_graphs_compute(api, graphs, hand_made, form):
    population, message = f"graphs-{form}", getattr(graphs, form)()
    state = write_checkpoint(graphs.initial_state())
    plans = message.SerializeToString(), hand_made.client_plan()
    task_id, found = create(api, population, *plans, state, goal=2, rounds=2)
    assert found["task"]["status"] == "OPEN", found
    plan = open_graph_plan(message)
    expected = state
    for number in (1, 2):
        devices = [told(api, population) for _ in range(2)]
        for _, checkpoint in devices:
            assert checkpoint == plan.client_checkpoint(expected)
        # Equal updates, since the order in which they arrive is the order of their sum.
        update = graphs.update_of(number)
        for assignment, _ in devices:
            give(api, assignment, update)
        found = finished(api, population, task_id, number)
        with plan.accumulator() as total:
            total.add(update)
            total.add(update)
            applied = plan.apply(expected, [total.partial()], 2)
        expected = applied.checkpoint
        stored = api.checkpoint(population, task_id, number)
        assert {name: value.tolist() for name, value in stored.items()} == {
            name: value.tolist() for name, value in read_checkpoint(expected).items()
        }
        metrics = {one["name"]: one["value"] for one in found["metrics"] if one["iteration_id"] == number}
        assert metrics == applied.metrics
    assert status(api, population, task_id, "COMPLETED")


def test_devices_with_the_references_plan_train_the_references_model(api, reference, plain_session):
    message = plan_pb2.Plan.FromString(reference("plan.pb"))
    leaves = dict(read_checkpoint(reference("initial_state.server.ckp")))
    # Without noise: the graph draws it from a generator that nothing here can seed.
    leaves["server/aggregator/query_state/numerator_state/stddev"] = np.array(0, np.float32)
    state = write_checkpoint(leaves)
    population, goal = "reference", int(leaves["server/aggregator/query_state/denominator"])
    client_plan = reference("client_only_plan.pb")
    task_id, found = create(api, population, reference("plan.pb"), client_plan, state, goal=goal, rounds=2)
    assert found["task"]["status"] == "OPEN", found
    rng = np.random.default_rng(5)
    runner, plain = PlanRunner(), plain_session(message)
    expected = state
    for number in (1, 2):
        examples = [
            training_example({"x": rng.random(784, dtype=np.float32), "y": np.array([index % 2])}) for index in range(6)
        ]
        devices = [told(api, population) for _ in range(goal)]
        updates = []
        for assignment, checkpoint in devices:
            run = runner.run(plan_pb2.ClientOnlyPlan.FromString(client_plan), checkpoint, examples)
            updates.append(read_checkpoint(run.update))
            give(api, assignment, updates[-1])
        finished(api, population, task_id, number)
        expected, _, metrics = plain.apply(expected, [plain.partial(updates)])
        stored = api.checkpoint(population, task_id, number)
        assert write_checkpoint(stored) == expected
        assert not np.array_equal(
            stored["server/global_model_weights/trainable/2"], leaves["server/global_model_weights/trainable/2"]
        )
        assert math.isfinite(metrics["server/client_work/train/loss"])
    runner.close()

    # Its evaluation, of the last model.
    info = task_pb2.TaskInfo()
    info.evaluation_info.training_population_name = population
    info.evaluation_info.training_task_id = task_id
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    evaluation, found = create(
        api, "reference-eval", reference("eval_plan.pb"), reference("eval_client_only_plan.pb"),
        reference("eval_initial_state.server.ckp"), goal=1, rounds=1, info=info,
    )  # fmt: skip
    assert found["task"]["status"] == "OPEN", found
    runner = PlanRunner()
    assignment, checkpoint = told(api, "reference-eval")
    assert "client/0/0/0" in read_checkpoint(checkpoint)
    run = runner.run(plan_pb2.ClientOnlyPlan.FromString(reference("eval_client_only_plan.pb")), checkpoint, examples)
    runner.close()
    update = read_checkpoint(run.update)
    give(api, assignment, update)
    found = finished(api, "reference-eval", evaluation, 1)
    (metric,) = found["metrics"]
    assert metric["name"] == "server/eval/loss"
    assert metric["value"] == pytest.approx(float(update["update/0/loss/0"] / update["update/0/loss/1"]), rel=1e-6)


def test_a_bad_upload_costs_one_contribution_and_no_round(api, graphs, hand_made):
    population, good = "graphs-bad", graphs.update_of(1)
    task_id, _ = create(
        api, population, graphs.one_graph().SerializeToString(), hand_made.client_plan(),
        write_checkpoint(graphs.initial_state()), goal=2, rounds=1, room=6,
    )  # fmt: skip
    # The round closes while its first uploads are judged: whoever is to come after them reports before.
    places = [api.upload_instruction(told(api, population)[0]) for _ in range(4)]
    bad = [{**good, "update/0": np.array(1, np.int64)}, {**good, "update/2/1": np.array([np.inf, 0], np.float32)}]
    for place, leaves in zip(places, [*bad, good, good], strict=True):
        assert api.upload(place, api.seal(leaves)).status_code == 200
    found = finished(api, population, task_id, 1)
    (iteration,) = found["iterations"]
    assert iteration["assignments"]["REMOTE_FAILED"] == 2, iteration


@pytest.mark.parametrize("form", ["one_graph", "two_graphs"])
def test_batches_are_merged_to_the_sum_of_all_their_devices(run_server, graphs, hand_made, form):
    api, population, update = run_server(collector_batch_size=2).api, "graphs-batches", graphs.update_of(1)
    message, state = getattr(graphs, form)(), write_checkpoint(graphs.initial_state())
    plans = message.SerializeToString(), hand_made.client_plan()
    task_id, found = create(api, population, *plans, state, goal=4, room=4)
    assert found["task"]["status"] == "OPEN", found
    for place in [api.upload_instruction(told(api, population)[0]) for _ in range(4)]:
        assert api.upload(place, api.seal(update)).status_code == 200
    finished(api, population, task_id, 1)
    plan = open_graph_plan(message)
    partial = graph_plan.add_up(plan, ["a", "b"], lambda _: update).partial
    applied = plan.apply(state, [partial, partial], 4)
    assert write_checkpoint(api.checkpoint(population, task_id, 1)) == applied.checkpoint
    entries = api.http.get(f"{api.url}/api/v1/populations/{population}/ledger").json()["entries"]
    assert {one["contributions"] for one in entries} == {4}


def test_the_ledger_counts_a_model_of_graphs_as_one_without_protection(api, graphs, hand_made):
    population = "graphs-ledger"
    task_id, _ = create(
        api, population, graphs.one_graph().SerializeToString(), hand_made.client_plan(),
        write_checkpoint(graphs.initial_state(stddev=10)), goal=1, rounds=1,
    )  # fmt: skip
    give(api, told(api, population)[0], graphs.update_of(1))
    finished(api, population, task_id, 1)
    entries = api.http.get(f"{api.url}/api/v1/populations/{population}/ledger").json()["entries"]
    model = next(one for one in entries if one["released"] == "model")
    assert (model["mechanism"], model["cumulative_epsilon"]) == ("NONE", None)
    assert model["event"] is not None


def test_a_model_of_graphs_overspends_any_budget(api, graphs, hand_made):
    population = "graphs-budget"
    answer = api.http.put(f"{api.url}/api/v1/populations/{population}/budget", json={"epsilon": 1e6, "delta": 1e-5})
    assert answer.status_code == 200, answer.text
    _, found = create(
        api, population, graphs.one_graph().SerializeToString(), hand_made.client_plan(),
        write_checkpoint(graphs.initial_state()), goal=1,
    )  # fmt: skip
    assert (found["task"]["status"], found["failure"]["code"]) == ("COMPLETED", Reason.BUDGET_SPENT.value)


@pytest.mark.parametrize("form", ["one_graph", "two_graphs"])
def test_an_update_that_runs_again_keeps_what_the_first_one_released(graphs, tmp_path, form):
    message = getattr(graphs, form)()
    plan, blobs = open_graph_plan(message), open_blob_store(tmp_path.as_uri())
    total = graph_plan.add_up(plan, ["a", "b"], lambda _: graphs.update_of(1))
    blobs.put(MODEL, "plan", gzip_bytes(message.SerializeToString()))
    blobs.put(MODEL, "0/checkpoint", write_checkpoint(graphs.initial_state(stddev=10)))
    blobs.put(AGGREGATED, "sum", gzip_bytes(total.partial))
    job = UpdateJob(
        blob_url=tmp_path.as_uri(),
        plan_path="plan",
        base_path="0/checkpoint",
        sums=(SumGroup(("sum",), 2),),
        checkpoint_path="1/checkpoint",
        client_checkpoint_path="1/client_checkpoint",
        metrics_path="1/metrics",
        max_checkpoint_bytes=1 << 20,
        key=IterationKey("once", 1, 1),
        report_goal=2,
        is_last=True,
        staleness=0,
        spending=Spending(Standing(0, None), {}),
        noise_key=bytes(32),
    )

    def stored():
        return {name: blobs.get(MODEL, f"1/{name}", limit=1 << 20) for name in ("client_checkpoint", "metrics")}

    first = update(job)
    released = stored()
    blobs.delete(MODEL, "1/client_checkpoint")
    assert update(job) == first
    assert stored() == released
    blobs.delete(MODEL, "1/checkpoint")
    # The noise is new every time, so what the second run left is what the first one drew.
    update(job)
    assert stored() != released
    assert first.contributions == 2
    assert [(one.released, one.mechanism) for one in first.releases] == [("model", "NONE"), ("metrics", "NONE")]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda graphs: graphs.one_graph("EVALUATION"), "EVALUATION"),
        (lambda graphs: plan_with(graphs, "WriteFile"), "WriteFile"),
    ],
    ids=["kind", "operation"],
)
def test_a_plan_that_cannot_run_fails_its_task_with_the_reason(api, graphs, hand_made, make, word):
    population = f"graphs-refused-{word}"
    task_id, found = create(
        api, population, make(graphs).SerializeToString(), hand_made.client_plan(),
        write_checkpoint(graphs.initial_state()), goal=1,
    )  # fmt: skip
    assert found["task"]["status"] == "FAILED"
    assert found["failure"]["code"] == Reason.PLAN_UNSUPPORTED.value
    # The message is stored a moment after the status.
    api.wait(lambda: word in api.task(population, task_id)["failure"]["message"])


def plan_with(graphs, operation):
    plan = graphs.one_graph()
    import tensorflow as tf

    definition = tf.compat.v1.GraphDef.FromString(plan.server_graph_bytes.value)
    definition.node.add(name="leads outside", op=operation)
    plan.server_graph_bytes.value = definition.SerializeToString()
    return plan


@pytest.mark.parametrize("form", ["one_graph", "two_graphs"])
def test_no_more_than_the_goal_is_counted_and_rounds_do_not_overlap(graphs, form):
    # A graph may divide by the goal that it was built for, and nothing outside can tell.
    plan = read_server_plan(gzip_bytes(getattr(graphs, form)().SerializeToString()), 1 << 20)
    assert (plan.has_graphs, plan.fixed_denominator, plan.overlaps) == (True, True, False)
    evaluation = read_server_plan(getattr(graphs, form)("EVALUATION").SerializeToString(), 1 << 20)
    assert (evaluation.fixed_denominator, evaluation.overlaps) == (False, False)


def test_a_state_of_another_model_fails_the_task_with_the_reason(api, graphs, hand_made):
    _, found = create(
        api, "graphs-misfit", graphs.one_graph().SerializeToString(), hand_made.client_plan(), write_checkpoint({}),
        goal=1,
    )  # fmt: skip
    assert (found["task"]["status"], found["failure"]["code"]) == ("FAILED", Reason.STATE_MISMATCH.value)
