"""Runs side by side: what the charts and the table say is what the API says of each."""

import re
import time
from html import unescape
from urllib.parse import quote, urlencode

import pytest

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.learning.specification import initial_state
from fedcompute.monitoring.pages.compare import MOST_RUNS
from fedcompute.protos import learning_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.releases import record_metrics
from fedcompute.storage.tasks import create_task
from fedcompute.tensors.checkpoint import write_checkpoint

ACCURACY = "sparse categorical accuracy"
LONG, SHORT = "long/1", "short/1"


@pytest.fixture(scope="module")
def running(start_server, tmp_path_factory):
    return start_server(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def lived(running, hand_made):
    """Two rounds under noise and one without, in two populations."""
    noised = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=4.0, report_goal=2))
    for name, process, rounds in (("long", noised, 2), ("short", hand_made.process_of(), 1)):
        task_id = running.api.open_task(name, process, goal=2, room=2, rounds=rounds)
        for number in range(1, rounds + 1):
            for correct in (1, 3):
                deltas = [0.01 * one for one in hand_made.initial]
                running.api.contribute(name, hand_made.update_of(process, deltas, metrics=(correct, 4, 1, 4)))
            running.api.wait_for(name, task_id, "COMPLETED", number)
        running.api.wait_for(name, task_id, "COMPLETED")


@pytest.fixture(scope="module")
def ask(running):
    def asked(*runs, path="/compare", headers=None, **query):
        text = urlencode([*(("run", one) for one in runs), *query.items()])
        return running.api.http.get(
            f"{running.settings.base_url}{path}?{text}", headers={"accept": "text/html", **(headers or {})}
        )

    return asked


@pytest.fixture(scope="module")
def chart(ask):
    """The lines of a chart of runs, as (x, y) in the runs' order."""

    def read(*runs, **query):
        answer = ask(*runs, path="/charts/compare", **query)
        assert answer.status_code == 200, answer.text
        document = answer.json()
        return [list(zip(one["x"], one["y"], strict=True)) for one in document["series"]], document

    return read


def some_task(tx, population):
    task = task_pb2.Task(
        population_name=population,
        total_iteration=3,
        min_aggregation_size=2,
        max_aggregation_size=5,
        min_client_version="0",
        max_client_version="99",
    )
    return create_task(tx, task, now()).key


def cells(answer):
    """The words in the table's cells, run by run."""
    rows = re.findall(r"<tr><td>.*?</tr>", answer.text)
    return [
        [re.sub(r"<[^>]+>", " ", unescape(cell)).split() for cell in re.findall(r"<td.*?</td>", row)] for row in rows
    ]


def chosen(answer):
    return [unescape(one) for one in re.findall(r'value="([^"]*)" checked', answer.text)]


def test_without_any_task_the_page_says_what_it_needs(start_server, tmp_path):
    one = start_server(tmp_path / "data")
    answer = one.api.http.get(f"{one.settings.base_url}/compare")
    assert answer.status_code == 200
    assert "Choose two tasks or more" in answer.text
    assert "There is no task yet." in answer.text


def test_runs_of_unequal_length_are_drawn_with_the_values_of_the_api(running, lived, chart):
    lines, document = chart(LONG, SHORT, metric=ACCURACY)
    for line, run in zip(lines, (LONG, SHORT), strict=True):
        metrics = running.api.task(*run.split("/"))["metrics"]
        assert line == [(one["iteration_id"], one["value"]) for one in metrics if one["name"].endswith("accuracy")]
    assert [len(line) for line in lines] == [2, 1]
    assert document["share"] is True
    devices, _ = chart(LONG, SHORT, measure="devices")
    assert devices == [[(1, 2), (2, 2)], [(1, 2)]]
    seconds, _ = chart(LONG, SHORT, measure="seconds")
    assert all(value > 0 for line in seconds for _, value in line)


def test_against_time_a_run_begins_where_its_first_round_opened(lived, chart):
    by_round, by_time = chart(LONG, measure="seconds")[0][0], chart(LONG, measure="seconds", x="time")
    ((first, second),), document = by_time
    assert (first[1], second[1]) == (by_round[0][1], by_round[1][1])
    # From the opening of a round to its release is what the round took.
    assert first[0] == pytest.approx(first[1])
    # Sums of floats: the second round opened when the first ended.
    assert second[0] >= first[0] + second[1] - 1e-6
    assert document["x_title"] == "seconds since the first round opened"


def test_the_table_tells_what_differs_and_what_each_run_came_to(running, lived, ask):
    answer = ask(LONG, SHORT, metric=ACCURACY)
    long, short = cells(answer)
    assert "noise multiplier" in answer.text
    assert (long[2], short[2]) == (["0.5"], ["0.5"])
    entries = running.api.http.get(f"{running.api.url}/api/v1/populations/long/ledger").json()["entries"]
    assert long[4] == [f"{entries[-1]['cumulative_epsilon']:,.4g}"]
    # A run without noise has not spent nothing.
    assert short[4] == ["unbounded"]
    assert (long[5], short[5]) == (["2"], ["1"])


def test_two_runs_that_have_measured_the_same_are_there_at_first(lived, ask):
    assert chosen(ask()) == [LONG, SHORT]


def test_no_more_runs_than_can_be_told_apart_are_drawn(running, lived, ask, chart):
    with running.app.state.context.database.write() as tx:
        keys = [some_task(tx, f"many{number:02}") for number in range(MOST_RUNS + 1)]
        for key in keys:
            record_metrics(tx, IterationKey(key.population, key.task_id, 1), {"x/loss": 1.0}, now())
    runs = [str(key) for key in keys]
    assert chosen(ask(*runs)) == runs[:MOST_RUNS]
    assert len(chart(*runs, metric="loss")[0]) == MOST_RUNS


def test_what_names_no_run_is_left_out(ask, lived):
    for run in ("nobody/1", "x", "", "/", "long/0", f"long/{10**30}", "<script>/1"):
        answer = ask(run)
        assert answer.status_code == 200, run
        assert chosen(answer) == []
        assert "<script>/" not in answer.text
    assert ask("long/1", metric="<b>none</b>").text.count("<b>") == 0


def test_a_name_is_text_wherever_it_stands(running, ask):
    name = "'&;(alert)=$"
    with running.app.state.context.database.write() as tx:
        key = some_task(tx, name)
        record_metrics(tx, IterationKey(name, key.task_id, 1), {"a/<b>loss": 1.0}, now())
    answer = ask(str(key))
    assert chosen(answer) == [str(key)]
    assert "<b>" not in answer.text
    assert f"run={quote(str(key), safe='')}" in answer.text


def test_a_page_that_did_not_change_is_not_sent_again_and_one_that_did_is(running, lived, ask):
    first = ask(LONG, SHORT)
    headers = {"if-none-match": first.headers["etag"]}
    assert ask(LONG, SHORT, headers=headers).status_code == 304
    with running.app.state.context.database.write() as tx:
        some_task(tx, "later")
    assert ask(LONG, SHORT, headers=headers).status_code == 200


def test_many_tasks_that_share_nothing_are_looked_at_once_each(start_server, tmp_path):
    one = start_server(tmp_path / "data")
    with one.app.state.context.database.write() as tx:
        for number in range(60):
            key = some_task(tx, f"alone{number:02}")
            values = {f"x/only{number}_{place}": 1.0 for place in range(5)}
            record_metrics(tx, IterationKey(key.population, key.task_id, 1), values, now())
    best = 60.0
    for _ in range(3):
        began = time.perf_counter()
        assert chosen(one.api.http.get(f"{one.settings.base_url}/compare")) == []
        best = min(best, time.perf_counter() - began)
    assert best < 0.3


def test_looking_at_a_task_that_is_not_open_does_not_fix_its_plan(running, hand_made, ask):
    first, second = (
        hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=noise, report_goal=2))
        for noise in (4.0, 8.0)
    )
    task = running.api.create_task("replaced", goal=2, room=2)

    def put(url, data):
        assert running.api.http.put(url, content=data).status_code == 200

    put(task.server_phase_url[0], gzip_bytes(hand_made.plan_of(first)))
    for path in ("/compare", "/tasks/replaced/1", "/charts/tasks/replaced/1/epsilon"):
        assert ask("replaced/1", path=path).status_code == 200
    put(task.server_phase_url[0], gzip_bytes(hand_made.plan_of(second)))
    put(task.init_checkpoint_url[0], write_checkpoint(initial_state(second, hand_made.initial, ())))
    put(task.client_only_plan_url[0], hand_made.client_plan())
    running.api.wait_for("replaced", 1, "OPEN")
    used = running.app.state.context.plans.server_plan(TaskKey("replaced", 1)).process
    assert used.fixed_gaussian.noise_multiplier == 8.0
    assert "noise multiplier" in ask("replaced/1", LONG).text
