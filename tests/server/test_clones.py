import httpx
import numpy as np
import pytest

from fedcompute.protos import learning_pb2, plan_pb2, task_pb2
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import MODEL, client_only_plan_path, initial_checkpoint_path, server_plan_path
from fedcompute.tensors.checkpoint import write_checkpoint

Leaf = learning_pb2.UpdateLeaf
_VALUES = {Leaf.ZEROED: np.int32(0), Leaf.COUNT: np.int32(1), Leaf.BELOW_ESTIMATE: np.float32(0.5)}
TREE = learning_pb2.TreeAggregation(clip_norm=1.0, noise_multiplier=0.5, report_goal=1, zeroing_norm=100.0)
ADAPTIVE = learning_pb2.AdaptiveGaussian(
    initial_clip_norm=0.5, noise_multiplier=0.05, report_goal=1, target_quantile=0.9, learning_rate=0.5
)


def update_for(process):
    made = {}
    for leaf in process.updates:
        shape = tuple(dim.size for dim in leaf.spec.shape.dim)
        value = _VALUES.get(leaf.role, np.float32(0.01))
        made[leaf.spec.name] = np.full(shape, value)
    return made


def clone(api, population, task_id, **query):
    return api.http.post(f"{api.url}/api/v1/tasks/{population}/{task_id}/clone", params=query)


def trained(api, population, process, rounds):
    """A task that has completed."""
    task_id = api.open_task(population, process, goal=1, rounds=rounds)
    for iteration in range(1, rounds + 1):
        api.contribute(population, update_for(process))
        api.wait_for(population, task_id, "COMPLETED", iteration=iteration)
    api.wait_for(population, task_id, "COMPLETED")
    return task_id


def test_a_task_that_is_over_can_be_run_again_as_it_was(api, hand_made):
    process = hand_made.process_of()
    old = trained(api, "again", process, 1)
    response = clone(api, "again", old)
    assert response.status_code == 201, response.text
    new = response.json()["task"]
    assert (new["task_id"], new["status"], new["kind"]) == (old + 1, "CREATED", "TRAINING")
    before = api.task("again", old)["task"]
    for name in ("total_iteration", "min_aggregation_size", "max_aggregation_size", "info", "max_client_version"):
        assert new[name] == before[name]
    base = f"{api.url}/api/v1/tasks/again"
    for artifact in ("plan", "client-plan", "checkpoint?iteration=0"):
        one, two = (api.http.get(f"{base}/{task_id}/{artifact}").content for task_id in (old, new["task_id"]))
        assert one == two
    api.wait_for("again", new["task_id"], "OPEN")
    api.contribute("again", update_for(process))
    api.wait_for("again", new["task_id"], "COMPLETED")
    first, second = (api.checkpoint("again", task_id, 1) for task_id in (old, new["task_id"]))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


def test_a_canceled_and_a_failed_task_can_be_run_again(api, hand_made):
    canceled = api.open_task("canceled", hand_made.process_of())
    api.http.post(f"{api.url}/api/v1/tasks/canceled/{canceled}/cancel")
    assert clone(api, "canceled", canceled).status_code == 201
    task = api.create_task("failed")
    for urls in (task.init_checkpoint_url, task.server_phase_url, task.client_only_plan_url):
        assert api.http.put(urls[0], content=b"nothing that anybody could use").status_code == 200
    api.wait_for("failed", task.task_id, "FAILED")
    response = clone(api, "failed", task.task_id)
    # What cannot be used once cannot be used twice.
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("aggregator", [None, TREE, ADAPTIVE], ids=["mean", "tree", "adaptive"])
def test_a_clone_goes_on_from_a_released_model_with_noise_and_clip_norms_of_its_own(api, hand_made, aggregator):
    population = f"onward-{'mean' if aggregator is None else type(aggregator).__name__}"
    process = hand_made.process_of(aggregator)
    old = trained(api, population, process, 2)
    response = clone(api, population, old, from_iteration=1)
    assert response.status_code == 201, response.text
    new = response.json()["task"]["task_id"]
    initial, released, begun = (
        api.checkpoint(population, old, 0),
        api.checkpoint(population, old, 1),
        api.checkpoint(population, new, 0),
    )
    moved = 0
    for name, value in begun.items():
        is_model = name.startswith(("server/global_model_weights/", "server/finalizer/"))
        np.testing.assert_array_equal(value, (released if is_model else initial)[name], err_msg=name)
        moved += is_model and value.tobytes() != initial[name].tobytes()
    assert moved
    api.wait_for(population, new, "OPEN")
    api.contribute(population, update_for(process))
    found = api.wait_for(population, new, "COMPLETED", iteration=1)
    # A tree that began anew: its first step is charged as a first step.
    assert [entry["event"].get("step", 1) for entry in found["ledger"]] == ([] if aggregator is None else [1])


def test_an_evaluation_is_cloned_with_its_plan_and_from_no_round(api, hand_made):
    training = hand_made.process_of()
    trained_id = trained(api, "graded", training, 1)
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = "graded"
    info.evaluation_info.training_task_id = trained_id
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    old = api.open_task("graded", hand_made.evaluation_of(training, ["sparse_categorical_accuracy"]), info=info)
    assert clone(api, "graded", old).json()["code"] == "task_conflict"
    api.http.post(f"{api.url}/api/v1/tasks/graded/{old}/cancel")
    assert clone(api, "graded", old, from_iteration=1).json()["code"] == "not_found"
    new = clone(api, "graded", old).json()["task"]
    assert new["kind"] == "EVALUATION"
    assert api.wait_for("graded", new["task_id"], "OPEN")["task"]["info"]["evaluation_info"]["training_task_id"] == str(
        trained_id
    )


def test_a_clone_that_cannot_be_leaves_nothing_behind(api, hand_made):
    task_id = api.open_task("refused", hand_made.process_of())
    assert clone(api, "refused", task_id).status_code == 409
    api.http.post(f"{api.url}/api/v1/tasks/refused/{task_id}/cancel")
    for query, status in (({"from_iteration": 1}, 404), ({"from_iteration": "x"}, 400), ({"from_iteration": -1}, 400)):
        assert clone(api, "refused", task_id, **query).status_code == status
    assert clone(api, "refused", 99).status_code == 404
    unfinished = api.create_task("unfinished").task_id
    api.http.post(f"{api.url}/api/v1/tasks/unfinished/{unfinished}/cancel")
    response = clone(api, "unfinished", unfinished)
    assert (response.status_code, response.json()["code"]) == (409, "task_conflict")
    for population in ("refused", "unfinished"):
        assert len(api.http.get(f"{api.url}/api/v1/tasks?population={population}").json()["tasks"]) == 1


def test_a_clone_speaks_protobuf_to_who_asks_for_it(api, hand_made):
    task_id = api.open_task("spoken", hand_made.process_of())
    api.http.post(f"{api.url}/api/v1/tasks/spoken/{task_id}/cancel")
    response = httpx.post(
        f"{api.url}/api/v1/tasks/spoken/{task_id}/clone", headers={"accept": "application/x-protobuf"}
    )
    assert task_pb2.CreateTaskResponse.FromString(response.content).task.task_id == task_id + 1


def graph_checkpoint(noise):
    """The first model of a plan with graphs, in the reference's layout, with a tree of noise or with none drawn yet."""
    tree = "server/aggregator/inner_agg/query_state/numerator_state"
    return write_checkpoint(
        {
            "server/global_model_weights/trainable/0": np.ones((2, 2), np.float32),
            f"{tree}/tree_state/level_buffer/0": np.full((1, 2, 2), noise, np.float32),
            f"{tree}/tree_state/value_generator_state/seeds": np.full(2, int(noise * 2), np.int64),
        }
    )


@pytest.mark.parametrize(("noise", "status"), [(0.0, 201), (0.5, 400)])
def test_two_tasks_never_share_the_noise_of_a_plan_with_graphs(run_server, noise, status):
    running = run_server()
    api, population = running.api, "graphs"
    task_id = api.create_task(population).task_id
    api.http.post(f"{api.url}/api/v1/tasks/{population}/{task_id}/cancel")
    key = TaskKey(population, task_id)
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase(server_phase=plan_pb2.ServerPhase(name="p"))])
    for path, data in (
        (initial_checkpoint_path(key), graph_checkpoint(noise)),
        (server_plan_path(key), plan.SerializeToString()),
        (client_only_plan_path(key), b"plan"),
    ):
        running.app.state.context.blobs.put(MODEL, path, data)
    assert clone(api, population, task_id, from_iteration=0).status_code == 400
    response = clone(api, population, task_id)
    assert response.status_code == status, response.text
    # What an operator may download has none of it either way.
    shown = api.checkpoint(population, task_id, 0)
    assert not any(value.any() for name, value in shown.items() if "tree_state" in name)
    assert shown["server/global_model_weights/trainable/0"].all()
