"""Budgets of populations over HTTP: what may still be released, and what the ledger says of it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.privacy.chain import verify_chain, verify_epsilons, verify_events
from fedcompute.privacy.ledger_document import ledger_from
from fedcompute.protos import learning_pb2, task_assignments_pb2, task_pb2
from fedcompute.server.rounds.update import UpdateResult, update
from fedcompute.tensors.tree import spec_from_proto

DELTA = 1e-6
PARTICIPATION = learning_pb2.PrivacyClaim.Participation


def epsilon_of(rounds, noise=1.0, delta=DELTA):
    return gaussian_epsilon(noise / rounds**0.5, delta)


def private(hand_made, noise=1.0, goal=1, participation=PARTICIPATION.NO_AMPLIFICATION):
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=noise, report_goal=goal))
    process.privacy_claim.participation = participation
    process.privacy_claim.estimated_population = 100
    process.privacy_claim.delta = DELTA
    return process


def contribute(api, hand_made, population, process, rounds=1):
    body = api.seal(hand_made.update_of(process, [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]))
    for _ in range(rounds):
        api.contribute(population, body=body)


def url_of(api, population, what):
    return f"{api.url}/api/v1/populations/{population}/{what}"


def ledger_of(api, population):
    response = api.http.get(url_of(api, population, "ledger"))
    assert response.status_code == 200, response.text
    return response.json()


def put_budget(api, population, epsilon, delta=DELTA, **more) -> httpx.Response:
    return api.http.put(url_of(api, population, "budget"), json={"epsilon": epsilon, "delta": delta, **more})


def findings(document):
    entries = ledger_from(document).entries
    return [*verify_chain(entries), *verify_events(entries), *verify_epsilons(entries)]


def test_every_release_is_an_entry_and_the_ledger_verifies(api, hand_made):
    process = private(hand_made)
    task_id = api.open_task("kept", process, goal=1, rounds=2, room=1)
    contribute(api, hand_made, "kept", process, rounds=2)
    api.wait_for("kept", task_id, "COMPLETED")
    document = ledger_of(api, "kept")
    told = [(one["sequence"], one["iteration_id"], one["released"], one["mechanism"]) for one in document["entries"]]
    assert told == [
        (1, 1, "model", "FIXED_GAUSSIAN"),
        (2, 1, "metrics", "NONE"),
        (3, 2, "model", "FIXED_GAUSSIAN"),
        (4, 2, "metrics", "NONE"),
    ]
    model = document["entries"][2]
    assert model["event"] == {"class": "GaussianDpEvent", "noise_multiplier": 1.0}
    assert model["claim"] == {
        "participation": "NO_AMPLIFICATION",
        "estimated_population": 100,
        "minimum_separation": 0,
        "report_goal": 1,
        "delta": DELTA,
    }
    assert (model["clip_norm"], model["report_goal"], model["contributions"]) == (1.0, 1, 1)
    assert model["cumulative_epsilon"] == pytest.approx(epsilon_of(2), rel=1e-9)
    assert document["entries"][1]["event"] is None
    assert document["budget"] is None
    assert document["tasks"] == {
        str(task_id): {"entries": 4, "kind": "TRAINING", "status": "COMPLETED", "reason": None}
    }
    assert findings(document) == []


def test_a_model_without_noise_makes_epsilon_infinite_from_there_on(api, hand_made):
    process = private(hand_made)
    first = api.open_task("bare", process, goal=1, room=1)
    contribute(api, hand_made, "bare", process)
    api.wait_for("bare", first, "COMPLETED")
    plain = hand_made.process_of()
    second = api.open_task("bare", plain, goal=1, room=1)
    contribute(api, hand_made, "bare", plain)
    found = api.wait_for("bare", second, "COMPLETED")
    document = ledger_of(api, "bare")
    assert [one["mechanism"] for one in document["entries"]] == ["FIXED_GAUSSIAN", "NONE", "NONE", "NONE"]
    assert document["entries"][2]["event"]["noise_multiplier"] == 0
    assert [one["cumulative_epsilon"] for one in document["entries"][2:]] == [None, None]
    assert found["ledger"] == []
    assert findings(document) == []


def test_a_round_that_would_overspend_is_not_opened_and_the_task_ends_with_the_reason(api, hand_made):
    process = private(hand_made)
    assert put_budget(api, "thrifty", (epsilon_of(2) + epsilon_of(3)) / 2).status_code == 200
    task_id = api.open_task("thrifty", process, goal=1, rounds=5, room=1)
    contribute(api, hand_made, "thrifty", process, rounds=2)
    found = api.wait_for("thrifty", task_id, "COMPLETED")
    assert [one["status"] for one in found["iterations"]] == ["COMPLETED", "COMPLETED"]
    assert found["task"]["reason"] == "budget_spent"
    assert found["failure"]["code"] == "budget_spent"
    assert "privacy budget spent" in found["failure"]["message"]
    (listed,) = api.http.get(f"{api.url}/api/v1/tasks", params={"population": "thrifty"}).json()["tasks"]
    assert (listed["status"], listed["reason"]) == ("COMPLETED", "budget_spent")
    document = ledger_of(api, "thrifty")
    assert document["budget"]["assumption"] == "CLAIMED"
    assert findings(document) == []


def test_a_round_that_the_budget_does_not_allow_leaves_nothing_behind(run_server, hand_made):
    running = run_server()
    api = running.api
    process = private(hand_made, goal=2)
    task_id = api.open_task("late", process, goal=2, rounds=3, room=3)
    waiting = api.assignment("late")
    # The round is under way when the budget comes.
    assert put_budget(api, "late", epsilon_of(1) / 2).status_code == 200
    contribute(api, hand_made, "late", process, rounds=2)
    found = api.wait_for("late", task_id, "COMPLETED")
    assert [one["status"] for one in found["iterations"]] == ["CANCELED"]
    assert found["iterations"][0]["completed"] is None
    assert found["failure"]["code"] == "budget_spent"
    assert found["metrics"] == found["ledger"] == ledger_of(api, "late")["entries"] == []
    assert api.http.get(f"{api.url}/api/v1/tasks/late/{task_id}/checkpoint?iteration=1").status_code == 404
    folder = running.settings.data_dir / "blobs" / "model" / "late" / str(task_id)
    assert [path for path in (folder / "1").rglob("*") if path.is_file()] == []
    # The device that was still computing hears that the round is closed, kindly.
    response = api.report(waiting)
    assert response.status_code == 200
    answer = task_assignments_pb2.ReportResultResponse.FromString(response.content)
    assert answer.HasField("rejection_info")
    assert api.check_in("late").status_code == 200


def test_a_model_without_noise_overspends_any_budget(api, hand_made):
    process = hand_made.process_of()
    assert put_budget(api, "plain", 1e6).status_code == 200
    task_id = api.open_task("plain", process, goal=1, room=1)
    found = api.wait_for("plain", task_id, "COMPLETED")
    assert found["iterations"] == []
    assert "inf" in found["failure"]["message"]


def test_a_second_task_of_a_population_pays_from_the_same_budget(api, hand_made):
    process = private(hand_made)
    assert put_budget(api, "shared", (epsilon_of(1) + epsilon_of(2)) / 2).status_code == 200
    first = api.open_task("shared", process, goal=1, room=1)
    contribute(api, hand_made, "shared", process)
    api.wait_for("shared", first, "COMPLETED")
    second = api.open_task("shared", process, goal=1, room=1)
    found = api.wait_for("shared", second, "COMPLETED")
    # No device is asked to work for a round that could not be released.
    assert found["iterations"] == []
    assert (found["task"]["reason"], found["failure"]["code"]) == ("budget_spent", "budget_spent")
    assert {one["task_id"] for one in ledger_of(api, "shared")["entries"]} == {first}


def test_a_budget_without_amplification_believes_no_claim(api, hand_made):
    process = private(hand_made, participation=PARTICIPATION.POISSON)
    for name, assumption, rounds in (("trusting", "CLAIMED", 1), ("wary", "NO_AMPLIFICATION", 0)):
        assert put_budget(api, name, epsilon_of(1) * 0.9, assumption=assumption).status_code == 200
        task_id = api.open_task(name, process, goal=1, room=1)
        if rounds:
            contribute(api, hand_made, name, process)
        found = api.wait_for(name, task_id, "COMPLETED")
        assert len(found["ledger"]) == rounds
        assert findings(ledger_of(api, name)) == []


def test_a_budget_is_set_read_and_removed(api):
    url = url_of(api, "managed", "budget")
    assert api.http.get(url).json() == {"budget": None}
    wanted = {"epsilon": 8.0, "delta": 1e-5, "assumption": "NO_AMPLIFICATION"}
    assert put_budget(api, "managed", 4, 1e-6).json()["budget"]["assumption"] == "CLAIMED"
    assert api.http.put(url, json=wanted).json() == {"budget": wanted}
    assert api.http.get(url).json() == {"budget": wanted}
    assert api.http.delete(url).status_code == 200
    assert api.http.delete(url).status_code == 404
    assert api.http.get(url).json() == {"budget": None}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"epsilon": 1}',
        b'{"epsilon": 0, "delta": 1e-6}',
        b'{"epsilon": NaN, "delta": 1e-6}',
        b'{"epsilon": Infinity, "delta": 1e-6}',
        b'{"epsilon": "1", "delta": 1e-6}',
        b'{"epsilon": true, "delta": 1e-6}',
        b'{"epsilon": 1, "delta": 1}',
        b'{"epsilon": 1, "delta": 0}',
        b'{"epsilon": 1, "delta": 1e-6, "assumption": "POISSON"}',
        b'{"epsilon": 1, "delta": 1e-6, "assumption": 1}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_budget_is_refused_with_a_reason(api, body):
    response = api.http.put(url_of(api, "managed", "budget"), content=body)
    assert response.status_code in (400, 413)
    assert response.json()["code"] in ("budget_invalid", "request_too_large")


def test_a_long_ledger_comes_in_pages(api, hand_made):
    process = private(hand_made)
    task_id = api.open_task("paged", process, goal=1, rounds=2, room=1)
    contribute(api, hand_made, "paged", process, rounds=2)
    api.wait_for("paged", task_id, "COMPLETED")
    url = url_of(api, "paged", "ledger")
    first = api.http.get(url, params={"limit": 3}).json()
    rest = api.http.get(url, params={"limit": 3, "after": first["next"]}).json()
    assert (first["next"], rest["next"]) == (3, None)
    assert first["entries"] + rest["entries"] == ledger_of(api, "paged")["entries"]
    assert api.http.get(url, params={"limit": 0}).status_code == 400
    assert api.http.get(url, params={"after": "x"}).status_code == 400


class Together:
    """An executor of threads that gives the results of the first two update jobs out only when it has both."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._both = threading.Barrier(2)
        self.updates = []

    def submit(self, job, argument):
        return self._pool.submit(self._run, job, argument)

    def _run(self, job, argument):
        result = job(argument)
        if job is update:
            self.updates.append((argument.key.task_id, result))
            if len(self.updates) <= 2:
                self._both.wait(20)
        return result

    capacity = 4

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def evaluation_info(population, training_task_id):
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = population
    info.evaluation_info.training_task_id = training_task_id
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    return info


def test_of_two_rounds_that_are_noised_at_once_the_last_of_the_budget_is_released_to_one(run_server, hand_made):
    executor = Together()
    running = run_server(executor=executor)
    api = running.api
    process = private(hand_made)
    process.metric_noise.clip_norm, process.metric_noise.noise_multiplier = 100.0, 1.0
    training = private(hand_made)
    evaluation = hand_made.evaluation_of(process, ["sparse_categorical_accuracy"])
    executor.updates += [None, None]
    teacher = api.open_task("teacher", training, goal=1, room=1)
    contribute(api, hand_made, "teacher", training)
    api.wait_for("teacher", teacher, "COMPLETED")

    assert put_budget(api, "racers", (epsilon_of(1) + epsilon_of(2)) / 2).status_code == 200
    info = evaluation_info("teacher", teacher)
    tasks = {
        api.open_task("racers", training, goal=1, rounds=2, room=1): training,
        api.open_task("racers", evaluation, goal=1, rounds=2, room=1, info=info): evaluation,
    }
    api.wait(lambda: all(api.task("racers", one)["iterations"] for one in tasks))
    instructions = []
    for _ in tasks:
        assignment = api.assignment("racers")
        of = tasks[int(assignment.task_id)]
        deltas = [np.full(leaf.shape, 0.01) for leaf in hand_made.initial] if of is training else []
        instructions.append((api.upload_instruction(assignment), api.seal(hand_made.update_of(of, deltas))))
    executor.updates.clear()
    for instruction, body in instructions:
        assert api.upload(instruction, body).status_code == 200
    found = [api.wait_for("racers", one, "COMPLETED") for one in tasks]

    ended = sorted(one["iterations"][0]["status"] for one in found)
    assert ended == ["CANCELED", "COMPLETED"]
    assert {one["task"]["reason"] for one in found} == {"budget_spent"}
    # Both had been noised and stored; the loser was looked at again and left nothing.
    assert [isinstance(result, UpdateResult) for _, result in executor.updates] == [True, True, False]
    entries = ledger_of(api, "racers")["entries"]
    assert len({one["task_id"] for one in entries}) == 1
    assert sum(one["event"] is not None for one in entries) == 1
    loser = next(one["task"]["task_id"] for one in found if one["iterations"][0]["status"] == "CANCELED")
    folder = running.settings.data_dir / "blobs" / "model" / "racers" / str(loser) / "1" / "s"
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert findings(ledger_of(api, "racers")) == []


AGGREGATORS = {
    "ADAPTIVE_GAUSSIAN": learning_pb2.AdaptiveGaussian(
        initial_clip_norm=1.0, noise_multiplier=0.05, report_goal=1, target_quantile=0.5, learning_rate=0.2
    ),
    "TREE_AGGREGATION": learning_pb2.TreeAggregation(
        clip_norm=1.0, noise_multiplier=2.0, report_goal=1, zeroing_norm=10.0
    ),
    "ADAPTIVE_TREE": learning_pb2.AdaptiveTree(
        initial_clip_norm=1.0, noise_multiplier=0.05, report_goal=1, zeroing_norm=10.0, target_quantile=0.5,
        learning_rate=0.2, restart_period=2,
    ),
    "BANDED_MF": learning_pb2.BandedMatrixFactorization(
        clip_norm=1.0, noise_multiplier=2.0, report_goal=1, coefficients=[1.0, 0.5]
    ),
}  # fmt: skip


@pytest.mark.parametrize("mechanism", AGGREGATORS)
@pytest.mark.parametrize("noised_metrics", [False, True])
def test_every_mechanism_is_charged_for_what_it_was_expected_to_cost(api, hand_made, mechanism, noised_metrics):
    process = hand_made.process_of(AGGREGATORS[mechanism])
    process.privacy_claim.participation = PARTICIPATION.MIN_SEPARATION
    process.privacy_claim.minimum_separation = 2
    process.privacy_claim.estimated_population = 100
    process.privacy_claim.delta = DELTA
    if noised_metrics:
        process.metric_noise.clip_norm, process.metric_noise.noise_multiplier = 100.0, 3.0
    population = f"kinds-{mechanism}-{noised_metrics}"
    assert put_budget(api, population, 1e6).status_code == 200
    task_id = api.open_task(population, process, goal=1, rounds=4, room=1)
    roles = learning_pb2.UpdateLeaf
    values = {roles.DELTA: 0.01, roles.COUNT: 1, roles.BELOW_ESTIMATE: 0.5, roles.ZEROED: 0}
    leaves = {}
    for leaf in process.updates:
        spec = spec_from_proto(leaf.spec)
        leaves[spec.name] = np.full(spec.shape, values.get(leaf.role, 1), spec.dtype)
    for _ in range(4):
        api.contribute(population, leaves)
    found = api.wait_for(population, task_id, "COMPLETED")
    assert [one["status"] for one in found["iterations"]] == ["COMPLETED"] * 4
    document = ledger_of(api, population)
    told = [(one["released"], one["mechanism"], one["event"] is None) for one in document["entries"][-3:]]
    metrics = ("metrics", "METRIC_GAUSSIAN", False) if noised_metrics else ("metrics", "NONE", True)
    zeroed = ("zeroed_count", metrics[1], True)
    expected = [("model", mechanism, False), metrics]
    assert told[-3:] == [*expected, zeroed] if "TREE" in mechanism else told[-2:] == expected
    assert findings(document) == []


def test_without_budget_left_evaluations_run_only_if_they_are_charged_for_nothing(api, hand_made):
    training = private(hand_made)
    trained = api.open_task("graded", training, goal=1, room=1)
    contribute(api, hand_made, "graded", training)
    api.wait_for("graded", trained, "COMPLETED")
    assert put_budget(api, "graded", epsilon_of(1) * 1.01).status_code == 200
    info = evaluation_info("graded", trained)

    noised = private(hand_made)
    noised.metric_noise.clip_norm, noised.metric_noise.noise_multiplier = 100.0, 1.0
    evaluation = hand_made.evaluation_of(noised, ["sparse_categorical_accuracy"])
    charged = api.open_task("graded", evaluation, goal=1, room=1, info=info)
    found = api.wait_for("graded", charged, "COMPLETED")
    assert (found["iterations"], found["task"]["reason"]) == ([], "budget_spent")

    plain = hand_made.evaluation_of(training, ["sparse_categorical_accuracy"])
    free = api.open_task("graded", plain, goal=1, room=1, info=info)
    api.contribute("graded", hand_made.update_of(plain, []))
    found = api.wait_for("graded", free, "COMPLETED")
    assert (found["iterations"][0]["status"], found["task"]["reason"]) == ("COMPLETED", None)
    document = ledger_of(api, "graded")
    last = document["entries"][-1]
    assert (last["task_id"], last["released"], last["mechanism"], last["event"]) == (free, "metrics", "NONE", None)
    assert last["cumulative_epsilon"] == document["entries"][0]["cumulative_epsilon"]
    assert findings(document) == []


def test_noise_on_metrics_alone_leaves_the_model_unprotected(api, hand_made):
    process = hand_made.process_of()
    process.metric_noise.clip_norm, process.metric_noise.noise_multiplier = 100.0, 1.0
    task_id = api.open_task("half", process, goal=1, room=1)
    api.contribute("half", hand_made.update_of(process, hand_made.initial))
    found = api.wait_for("half", task_id, "COMPLETED")
    assert found["ledger"] == []
    document = ledger_of(api, "half")
    assert [(one["mechanism"], one["cumulative_epsilon"]) for one in document["entries"]] == [
        ("NONE", None),
        ("METRIC_GAUSSIAN", None),
    ]
    assert findings(document) == []
