"""A task's page and its charts: what they say is what the API, the files and the ledger say."""

import json
import re
from datetime import timedelta
from html import unescape
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from sqlalchemy import insert, select

from fedcompute.errors import CATALOGUE, Reason
from fedcompute.protos import learning_pb2, task_assignments_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.storage import schema
from fedcompute.storage.api_keys import Role, create_api_key
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.releases import record_metrics
from fedcompute.storage.schema import IterationStatus, of_task
from fedcompute.storage.tasks import cancel_task, create_task
from fedcompute.tensors.tree import spec_from_proto

ACCURACY = "sparse_categorical_accuracy"
TRAINED, EVALUATED = f"server/client_work/train/{ACCURACY}", f"server/eval/{ACCURACY}"
NAME = "lived"
ROUNDS = 3


@pytest.fixture(scope="module")
def running(start_server, tmp_path_factory):
    return start_server(tmp_path_factory.mktemp("task"), require_api_keys=True)


@pytest.fixture(scope="module")
def database(running):
    return running.app.state.context.database


@pytest.fixture(scope="module")
def keys(database):
    """Role -> key."""
    with database.write() as tx:
        return {role: create_api_key(tx, role, role.value, now())[1] for role in Role}


@pytest.fixture(scope="module")
def api(running, keys):
    running.api.http.headers["authorization"] = f"Bearer {keys[Role.OPERATOR]}"
    return running.api


@pytest.fixture(scope="module")
def ask(api):
    """Asks for an address as an operator, or with the headers that are given."""

    def asked(address, accept="text/html", **headers):
        return api.http.get(api.url + address, headers={"accept": accept, **headers})

    return asked


@pytest.fixture(scope="module")
def chart(ask):
    """A chart of a task by its name: its series by name, as (x, y), and the whole document."""

    def read(task, name):
        answer = ask(f"/charts/tasks/{task}/{name}")
        assert answer.status_code == 200, answer.text
        document = answer.json()
        return {one["name"]: list(zip(one["x"], one["y"], strict=True)) for one in document["series"]}, document

    return read


def private(hand_made, noise=1.0):
    return hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=noise, report_goal=2))


def small(hand_made):
    return [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]


def measuring(population, task_id, size):
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = population
    info.evaluation_info.training_task_id = task_id
    info.evaluation_info.check_point_selector.iteration_selector.size = size
    return info


@pytest.fixture(scope="module")
def lived(api, hand_made):
    """Three private rounds of two devices, and an evaluation of the first and third; returns both tasks' ids.

    In the first round one device has no examples and one sends numbers that are not finite.
    """
    process = private(hand_made)
    training = api.open_task(NAME, process, goal=2, rounds=ROUNDS, room=3)
    absent = api.assignment(NAME)
    assert api.report(absent, task_assignments_pb2.ReportResultRequest.NOT_ELIGIBLE).status_code == 200
    api.contribute(NAME, hand_made.update_of(process, [np.full(leaf.shape, np.nan) for leaf in hand_made.initial]))
    for number in range(1, ROUNDS + 1):
        for _ in range(2):
            api.contribute(NAME, hand_made.update_of(process, small(hand_made)))
        api.wait_for(NAME, training, "COMPLETED", number)
    api.wait_for(NAME, training, "COMPLETED")
    evaluation = hand_made.evaluation_of(process, [ACCURACY])
    info = measuring(NAME, training, 2)
    evaluating = api.open_task(NAME, evaluation, goal=1, rounds=2, room=1, info=info)
    for correct in (3, 1):
        api.contribute(NAME, hand_made.update_of(evaluation, [], metrics=(correct, 4, 1, 4)))
    api.wait_for(NAME, evaluating, "COMPLETED")
    return training, evaluating


def words(answer):
    """What a page says, without its markup."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", answer.text)))


def some_task(tx, population, rounds=3, info=None):
    task = task_pb2.Task(
        population_name=population,
        total_iteration=rounds,
        min_aggregation_size=2,
        max_aggregation_size=5,
        min_client_version="0",
        max_client_version="99",
    )
    if info is not None:
        task.info.CopyFrom(info)
    return create_task(tx, task, now()).key


def old_rounds(tx, task, numbers):
    """Rounds as they stand in the database after their release."""
    opened = now() - timedelta(days=1)
    rows = [
        {
            "population_name": task.population,
            "task_id": task.task_id,
            "iteration_id": number,
            "attempt_id": 0,
            "status": int(IterationStatus.COMPLETED),
            "status_id": 4,
            "status_time": opened + timedelta(seconds=60 * number),
            "created_time": opened + timedelta(seconds=60 * number),
            "base_iteration_id": number - 1,
            "base_on_result_id": number - 1,
            "report_goal": 2,
            "result_id": number,
            "info": {},
            "aggregation_level": 2,
            "max_aggregation_size": 5,
            "min_client_version": "0",
            "max_client_version": "99",
        }
        for number in numbers
    ]
    tx.execute(insert(schema.iteration), rows)


def test_a_metric_has_the_values_of_its_files_and_the_evaluation_stands_at_the_round_it_measured(
    chart, api, running, lived
):
    training, evaluating = lived
    root = Path(running.settings.data_dir) / "blobs" / "model" / NAME

    def stored(task_id, number, name):
        return json.loads((root / str(task_id) / str(number) / "s/0/metrics").read_bytes())[name]

    measured = {one["iteration_id"]: one["evaluated_iteration_id"] for one in api.task(NAME, evaluating)["iterations"]}
    assert set(measured.values()) == {1, 3}
    expected = sorted((at, stored(evaluating, number, EVALUATED)) for number, at in measured.items())
    series, document = chart(f"{NAME}/{training}", f"metric?name={TRAINED}")
    assert series == {
        "training": [(number, stored(training, number, TRAINED)) for number in range(1, ROUNDS + 1)],
        "evaluation": expected,
    }
    assert [one["dashed"] for one in document["series"]] == [False, True]
    assert [one["colour"] for one in document["series"]] == [0, 1]
    assert document["share"] is True
    # Points with rounds between them that were not measured: joined and marked, or nobody sees them.
    series, document = chart(f"{NAME}/{evaluating}", f"metric?name={EVALUATED}")
    assert series == {"evaluation": expected}
    assert document["series"][0]["marks"] is True
    assert document["x_title"] == "training round measured"
    assert chart(f"{NAME}/{training}", "metric?name=nothing")[0] == {}


def test_devices_rejections_and_times_of_each_round_are_those_of_the_api(chart, api, lived):
    task = f"{NAME}/{lived[0]}"
    rounds = api.task(NAME, lived[0])["iterations"]
    series, document = chart(task, "devices")
    drawn = {(name.upper().replace(" ", "_"), x): y for name, points in series.items() for x, y in points if y}
    assert drawn == {
        (status, one["iteration_id"]): count for one in rounds for status, count in one["assignments"].items()
    }
    assert drawn["LOCAL_NOT_ELIGIBLE", 1] == drawn["REMOTE_FAILED", 1] == 1
    assert (document["kind"], document["stacked"]) == ("bar", True)
    assert chart(task, "rejections")[0] == {"not finite": [(1, 1), (2, 0), (3, 0)]}
    phases, _ = chart(task, "phases")
    assert list(phases) == ["collect", "aggregate", "apply"]
    whole, document = chart(task, "completion")
    taken = [sum(parts) for parts in zip(*([y for _, y in points] for points in phases.values()), strict=True)]
    assert [60 * y for _, y in whole["iteration completion time"]] == pytest.approx(taken)
    assert document["logarithmic"] is True
    working, _ = chart(task, "working")
    after = [phases["aggregate"][at][1] + phases["apply"][at][1] for at in range(ROUNDS)]
    assert [y for _, y in working["aggregation and model update time"]] == pytest.approx(after)
    assert chart(task, "over-time")[0] == {task: [(one["opened"], one["iteration_id"]) for one in rounds]}
    minutes, _ = chart(task, "minutes")
    assert sum(y for _, y in minutes["assigned"]) == sum(sum(one["assignments"].values()) for one in rounds)
    for name in ("training", "upload", "assignment"):
        ((_, points),) = chart(task, name)[0].items()
        assert [x for x, _ in points] == [1, 2, 3]
        assert all(y > 0 for _, y in points)


def test_what_was_spent_is_what_the_ledger_says(chart, api, lived):
    task = f"{NAME}/{lived[0]}"
    entries = [one for one in api.task(NAME, lived[0])["ledger"] if one["released"] == "model"]
    spent = [(one["iteration_id"], one["cumulative_epsilon"]) for one in entries]
    assert len(spent) == ROUNDS
    assert chart(task, "epsilon")[0] == {"spent": spent}
    assert chart(task, "noise")[0] == {"noise multiplier": [(number, 1.0) for number, _ in spent]}
    assert chart(task, "clip")[0] == {"clip norm": [(one["iteration_id"], one["clip_norm"]) for one in entries]}


def test_an_adaptive_clip_norm_moves_and_its_noise_is_that_of_the_plan(chart, api, hand_made):
    process = hand_made.process_of(
        learning_pb2.AdaptiveGaussian(
            initial_clip_norm=1.0, noise_multiplier=0.05, report_goal=1, target_quantile=0.5, learning_rate=0.2
        )
    )
    roles = learning_pb2.UpdateLeaf
    values = {roles.DELTA: 0.01, roles.COUNT: 1, roles.BELOW_ESTIMATE: 0.5}
    specs = [(spec_from_proto(leaf.spec), leaf.role) for leaf in process.updates]
    leaves = {spec.name: np.full(spec.shape, values.get(role, 1), spec.dtype) for spec, role in specs}
    task_id = api.open_task("moved", process, goal=1, rounds=2, room=1)
    for _ in range(2):
        api.contribute("moved", leaves)
    api.wait_for("moved", task_id, "COMPLETED")
    noise = chart(f"moved/{task_id}", "noise")[0]["noise multiplier"]
    assert [y for _, y in noise] == pytest.approx([0.05, 0.05])
    (first, second) = chart(f"moved/{task_id}", "clip")[0]["clip norm"]
    assert first[1] == 1.0
    assert second[1] != 1.0


def test_the_page_says_what_the_api_says(ask, api, lived):
    training, evaluating = lived
    answer = ask(f"/tasks/{NAME}/{training}")
    said, view = words(answer), api.task(NAME, training)
    newest = {one["name"]: one["value"] for one in view["metrics"] if one["iteration_id"] == ROUNDS}
    last = max(api.task(NAME, evaluating)["metrics"], key=lambda one: (one["iteration_id"], one["name"] == EVALUATED))
    assert f"Rounds released {ROUNDS} of {ROUNDS}" in said
    assert f"sparse categorical accuracy, round {ROUNDS} {newest[TRAINED]:.4g}" in said
    assert f"evaluation: sparse categorical accuracy {last['value']:.4g}" in said
    assert f"Epsilon spent {view['ledger'][-1]['cumulative_epsilon']:,.4g}" in said
    for one in view["iterations"]:
        counted, rejected = (one["assignments"].get(name, 0) for name in ("UPLOAD_COMPLETED", "REMOTE_FAILED"))
        assert f"{one['iteration_id']} completed {counted} {one['report_goal']} {rejected} " in said
    assert "noise multiplier 1.0" in said
    assert f'href="/tasks/{NAME}/{training}">task {training}</a>' in ask(f"/tasks/{NAME}/{evaluating}").text
    # What it offers to load is there.
    offered = [unescape(one) for one in re.findall(r'href="(/api/v1/tasks/[^"]+)"', answer.text)]
    assert len(offered) == 2
    for address in offered:
        assert ask(address, accept="*/*").status_code == 200
    drawn = [unescape(one) for one in re.findall(r'data-chart="([^"]+)"', answer.text)]
    assert len(drawn) == len(set(drawn)) >= 14
    for address in drawn:
        assert ask(address).status_code == 200
        table = ask(f"{address}&format=csv" if "?" in address else f"{address}?format=csv")
        assert table.headers["content-type"].startswith("text/csv")


def test_the_page_is_sent_again_when_something_happened_and_only_then(ask, api, hand_made, database):
    process = private(hand_made)
    training = api.open_task("moving", process, goal=1, rounds=1)
    api.wait(lambda: api.task("moving", training)["iterations"])
    key, path, tags = TaskKey("moving", training), f"/tasks/moving/{training}", []

    def changed():
        answer = ask(path, **({"if-none-match": tags[-1]} if tags else {}))
        assert answer.status_code in (200, 304)
        if answer.status_code == 200:
            tags.append(answer.headers["etag"])
        return answer.status_code == 200

    assert changed()
    assert not changed()
    assert "0 of 1 contributions" in words(ask(path))
    api.contribute("moving", hand_made.update_of(process, small(hand_made)))
    api.wait_for("moving", training, "COMPLETED")
    assert changed()

    def settled():
        with database.read() as tx:
            return tx.execute(select(schema.iteration.c.settled_time).where(of_task(schema.iteration, key))).scalar()

    # From here on nothing happens to the task itself.
    api.wait(settled)
    changed()
    assert 'data-announce="Round 1 released, ' in ask(path).text
    # Its evaluation stands on the page, and so does its population's budget.
    evaluation = hand_made.evaluation_of(process, [ACCURACY])
    info = measuring("moving", training, 1)
    evaluating = api.open_task("moving", evaluation, goal=1, rounds=1, room=1, info=info)
    changed()
    api.contribute("moving", hand_made.update_of(evaluation, [], metrics=(3, 4, 1, 4)))
    api.wait_for("moving", evaluating, "COMPLETED")
    assert changed()
    assert "evaluation: sparse categorical accuracy 0.75" in words(ask(path))
    budget = {"epsilon": 1e6, "delta": api.task("moving", training)["ledger"][-1]["delta"]}
    assert api.http.put(f"{api.url}/api/v1/populations/moving/budget", json=budget).status_code == 200
    assert changed()
    assert "Left of the population's budget" in words(ask(path))


def test_a_budget_is_the_limit_of_the_chart_and_its_end_is_told_with_what_to_do(ask, chart, api, hand_made):
    process, delta = private(hand_made), 1e-5
    process.privacy_claim.estimated_population = 100
    process.privacy_claim.delta = delta
    training = api.open_task("spent", process, goal=2, rounds=2)
    for _ in range(2):
        api.contribute("spent", hand_made.update_of(process, small(hand_made)))
    (entry, *_) = api.wait_for("spent", training, "COMPLETED", 1)["ledger"]
    limit = entry["cumulative_epsilon"] * 1.01
    answer = api.http.put(f"{api.url}/api/v1/populations/spent/budget", json={"epsilon": limit, "delta": delta})
    assert answer.status_code == 200, answer.text
    for _ in range(2):
        api.contribute("spent", hand_made.update_of(process, small(hand_made)))
    api.wait_for("spent", training, "COMPLETED")

    def told():
        # The reason's own words, until the task's are written.
        failure = api.task("spent", training)["failure"]
        return failure if failure["message"] != "budget spent" else None

    failure = api.wait(told)
    series, _ = chart(f"spent/{training}", "epsilon")
    assert series["budget"] == [(1, limit), (1, limit)]
    assert series["left"] == [(1, limit - entry["cumulative_epsilon"])]
    said = words(ask(f"/tasks/spent/{training}"))
    assert f"Ended early: {failure['message']}" in said
    assert f"What to do: {failure['remedy']}" in said


def test_a_task_without_a_round_says_what_it_waits_for(ask, chart, database):
    with database.write() as tx:
        key = some_task(tx, "fresh")
    answer = ask(f"/tasks/{key}")
    assert answer.status_code == 200
    said = words(answer)
    assert "The task waits for its artifacts" in said
    assert "Metrics appear when the first round is released." in said
    assert "Newest checkpoint" not in said
    # Where the script puts the charts of metrics that come with the first round.
    for place in ("learning", "metrics"):
        assert f'class="charts" id="{place}"' in answer.text
    names = [unescape(one).partition("fresh/1/")[2] for one in re.findall(r'data-chart="([^"]+)"', answer.text)]
    assert len(names) >= 12
    for name in names:
        series, document = chart(key, name)
        assert series == {}
        assert document["empty"]


def test_older_rounds_are_behind_links_and_none_is_missing(ask, chart, database):
    with database.write() as tx:
        key = some_task(tx, "long", rounds=120)
        old_rounds(tx, key, range(1, 121))
        assert cancel_task(tx, key, now())
    found, address = [], f"/tasks/{key}"
    while address:
        text = ask(address).text
        found.append([int(one) for one in re.findall(rf'<tr><td><a href="/tasks/{key}/rounds/(\d+)"', text)])
        link = re.search(r'href="([^"]+)">Older rounds', text)
        address = unescape(link[1]) if link else None
    assert [len(one) for one in found] == [50, 50, 20]
    assert list(chain.from_iterable(found)) == list(range(120, 0, -1))
    assert f"/charts/tasks/{key}/phases?before=21" in text
    drawn = chart(key, "over-time?before=21")[0][str(key)]
    assert [y for _, y in drawn] == list(range(1, 21))
    for nonsense in ("abc", "-1", "9" * 40, "²"):
        assert ask(f"/tasks/{key}?before={nonsense}").status_code == 200


def test_an_evaluation_of_another_population_is_not_taken_for_ones_own(ask, chart, database):
    with database.write() as tx:
        taught, other = some_task(tx, "school"), some_task(tx, "academy")
        assert taught.task_id == other.task_id
        stranger = some_task(tx, "school", info=measuring("academy", other.task_id, 1))
        for key, name in ((taught, TRAINED), (stranger, EVALUATED)):
            old_rounds(tx, key, [1])
            record_metrics(tx, IterationKey(key.population, key.task_id, 1), {name: 0.5}, now())
    assert list(chart(taught, f"metric?name={TRAINED}")[0]) == ["training"]
    assert "evaluation:" not in words(ask(f"/tasks/{taught}"))
    assert f'href="/tasks/{other}"' in ask(f"/tasks/{stranger}").text


def test_names_of_populations_and_metrics_are_text(ask, database):
    name, metric = "'&;(alert)=$", 'x/"><script>alert(1)</script>{{7*7}}/&accuracy'
    with database.write() as tx:
        key = some_task(tx, name)
        record_metrics(tx, IterationKey(name, key.task_id, 1), {metric: 0.5}, now())
    place = quote(name, safe="")
    answer = ask(f"/tasks/{place}/{key.task_id}")
    assert answer.status_code == 200
    assert "<script>alert" not in answer.text
    assert "49" not in words(answer)
    assert "<h1>&#39;&amp;;(alert)=$ " in answer.text
    address = unescape(re.search(r'data-chart="([^"]+/metric[^"]+)"', answer.text)[1])
    assert ask(address).json()["series"][0]["y"] == [0.5]


@pytest.mark.parametrize(
    ("role", "buttons"),
    [
        (Role.VIEWER, []),
        (Role.BUILDER, ["Clone"]),
        (Role.OPERATOR, ["Pause", "Clone", "Cancel"]),
    ],
    ids=["viewer", "builder", "operator"],
)
def test_buttons_are_there_for_who_may_press_them_and_posts_are_refused_to_others(
    ask, api, keys, hand_made, role, buttons
):
    name = f"role-{role.value}"
    path = f"/tasks/{name}/{api.open_task(name, hand_made.process_of(), goal=2)}"
    bearer = {"authorization": f"Bearer {keys[role]}"}
    shown = re.findall(r'class="button(?: danger)?"[^>]*>([^<]+)<', ask(path, **bearer).text.partition("<dl")[0])
    assert shown == buttons
    if role is not Role.OPERATOR:
        for verb in ("pause", "cancel") if role is Role.BUILDER else ("pause", "cancel", "clone"):
            answer = api.http.post(api.url + path + f"/{verb}", headers={**bearer, "accept": "text/html"})
            assert answer.status_code == 403, verb
            assert CATALOGUE[Reason.ROLE_INSUFFICIENT].remedy in unescape(answer.text)
        assert api.task(name, 1)["task"]["status"] == "OPEN"
        return
    for verb, status, gone, come in (("pause", "PAUSED", "Pause", "Go on"), ("resume", "OPEN", "Go on", "Pause")):
        answer = api.http.post(api.url + path + f"/{verb}", headers=bearer)
        assert (answer.status_code, answer.headers["location"]) == (303, path)
        assert api.task(name, 1)["task"]["status"] == status
        head = ask(path, **bearer).text.partition("<dl")[0]
        assert f">{come}<" in head
        assert f">{gone}<" not in head


@pytest.mark.parametrize("address", ["/tasks/nobody/1", "/charts/tasks/nobody/1/phases", "/charts/tasks/nobody/1/none"])
def test_what_is_not_there_is_a_page_for_people_and_json_for_programs(ask, address):
    answer = ask(address)
    assert answer.status_code == 404
    assert "<h1" in answer.text
    assert ask(address, accept="application/json").json()["code"] == "not_found"
