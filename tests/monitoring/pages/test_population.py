"""One population: its tasks and rounds, and what its devices did, minute by minute."""

import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import func, select

from fedcompute.protos import task_assignments_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.storage import schema
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import record_metrics
from fedcompute.storage.request_minutes import BUCKETS, CHECK_IN, RequestMinute, add_request_minutes
from fedcompute.storage.schema import AssignmentStatus
from fedcompute.storage.tasks import cancel_task, create_task

ACCURACY = "sparse categorical accuracy"
NAME = "lived"


@pytest.fixture(scope="module")
def running(start_server, tmp_path_factory):
    return start_server(tmp_path_factory.mktemp("population"))


@pytest.fixture(scope="module")
def database(running):
    return running.app.state.context.database


@pytest.fixture(scope="module")
def ask(running):
    """Asks for an address; returns the answer."""

    def asked(address, accept="text/html", **headers):
        return running.api.http.get(running.settings.base_url + address, headers={"accept": accept, **headers})

    return asked


@pytest.fixture(scope="module")
def chart(ask):
    """A chart of the population by its name and query: series by name, as (x, y), and the whole document."""

    def read(address, name=NAME):
        answer = ask(f"/charts/populations/{name}/{address}")
        assert answer.status_code == 200, answer.text
        document = answer.json()
        return {one["name"]: list(zip(one["x"], one["y"], strict=True)) for one in document["series"]}, document

    return read


@pytest.fixture(scope="module")
def task_id(running, hand_made):
    """Two rounds of two devices each that were released; one device more could not train."""
    process = hand_made.process_of()
    made = running.api.open_task(NAME, process, goal=2, rounds=2, room=3)
    update = hand_made.update_of(process, hand_made.initial)
    failed = running.api.assignment(NAME)
    result = task_assignments_pb2.ReportResultRequest.FAILED_EXAMPLE_GENERATION
    assert running.api.report(failed, result).status_code == 200
    for number in (1, 2):
        for _ in range(2):
            running.api.contribute(NAME, update)
        running.api.wait_for(NAME, made, "COMPLETED", number)
    running.api.wait_for(NAME, made, "COMPLETED")
    return made


def words(answer):
    """What a page says, without its markup."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", answer.text)))


def some_task(tx, population):
    task = task_pb2.Task(
        population_name=population,
        total_iteration=3,
        min_aggregation_size=2,
        max_aggregation_size=5,
        min_client_version="7",
        max_client_version="99",
    )
    return create_task(tx, task, now()).key


def test_assignments_per_minute_are_first_arrivals_and_zero_between_them(chart, database, task_id):
    history = schema.assignment_status_history
    first = func.min(history.c.created_time)
    query = select(history.c.status, first).where(history.c.population_name == NAME)
    with database.read() as tx:
        rows = tx.execute(query.group_by(history.c.session_id, history.c.status)).all()
    expected = Counter(
        (AssignmentStatus(status).name.lower().replace("_", " "), moment.replace(second=0, microsecond=0).isoformat())
        for status, moment in rows
    )
    series, document = chart("minutes")
    drawn = {(name, moment): count for name, points in series.items() for moment, count in points}
    assert {key: count for key, count in drawn.items() if count} == expected
    assert sum(count for (name, _), count in expected.items() if name == "local failed example generation") == 1
    moments = [datetime.fromisoformat(moment) for moment, _ in series["assigned"]]
    assert {after - before for before, after in pairwise(moments)} <= {timedelta(minutes=1)}
    assert all([datetime.fromisoformat(moment) for moment, _ in points] == moments for points in series.values())
    assert document["y_title"] == "assignments per minute"


def test_iterations_over_time_are_those_of_the_api(chart, running, task_id):
    rounds = running.api.task(NAME, task_id)["iterations"]
    series, _ = chart("over-time")
    assert series == {f"task {task_id}": [(one["opened"], one["iteration_id"]) for one in rounds]}


def test_a_metric_has_the_values_of_its_files(chart, running, task_id):
    root = Path(running.settings.data_dir) / "blobs" / "model" / NAME / str(task_id)
    files = {number: json.loads((root / str(number) / "s/0/metrics").read_bytes()) for number in (1, 2)}
    key = next(one for one in files[1] if one.endswith("sparse_categorical_accuracy"))
    series, document = chart(f"metric?metric={ACCURACY}")
    assert series == {f"{NAME}/{task_id}-{ACCURACY}": [(number, files[number][key]) for number in (1, 2)]}
    assert document["share"] is True
    assert chart("metric?metric=nothing")[0] == {}


def test_check_ins_and_reports_are_counted_by_what_they_were_told(chart, task_id):
    def total(address):
        series, _ = chart(address)
        return {name: sum(count for _, count in points) for name, points in series.items()}

    told = total("check-ins")
    # Contributors that found their round closed came again, so only reports tell the devices apart.
    assert total("check-ins?result=CREATED") == {"CREATED": told["CREATED"]}
    assert total("check-ins?result=NO_TASK_AVAILABLE").get("NO_TASK_AVAILABLE") == told.get("NO_TASK_AVAILABLE")
    reports = total("reports")
    assert reports["FAILED_EXAMPLE_GENERATION"] == 1
    assert told["CREATED"] >= sum(reports.values()) >= 5


def test_a_range_of_time_leaves_out_what_was_before(chart, database):
    long_ago = now().replace(second=0, microsecond=0) - timedelta(hours=3)
    with database.write() as tx:
        some_task(tx, "before")
        buckets = (4,) + (0,) * len(BUCKETS)
        add_request_minutes(
            tx, [RequestMinute(long_ago, CHECK_IN, "before", "NO_TASK_AVAILABLE", 4, 0.1, 0.1, buckets)]
        )
    series, document = chart("check-ins?range=6 hours", "before")
    assert dict(series["NO_TASK_AVAILABLE"])[long_ago.isoformat()] == 4
    # The minute before and the one behind it are known to have none.
    assert [count for _, count in series["NO_TASK_AVAILABLE"]] == [0, 4, 0]
    assert document["y_title"] == "check-ins per minute"
    series, document = chart("check-ins?range=hour", "before")
    assert (series, document["empty"]) == ({}, "No request in this time.")
    assert chart("check-ins?range=nonsense", "before") == chart("check-ins", "before")


def test_the_page_has_tasks_and_rounds_with_what_the_api_says_of_them(ask, running, task_id):
    view = running.api.task(NAME, task_id)
    said = words(ask(f"/populations/{NAME}"))
    metrics = {one["name"].rpartition("/")[2]: one["value"] for one in view["metrics"] if one["iteration_id"] == 2}
    assert f"task {task_id} training completed 2 of 2 2 3 0 to 999999999" in said
    assert f"{ACCURACY} {metrics['sparse_categorical_accuracy']:,.4g}" in said
    rounds = said[said.index("Newest rounds") :]
    for one in view["iterations"]:
        opened = datetime.fromisoformat(one["opened"]).astimezone(UTC)
        assert f"task {task_id} {one['iteration_id']} completed 2 3 0 to 999999999 {opened:%Y-%m-%d %H:%M:%S}" in rounds


def test_tasks_of_one_status_are_paged_with_the_choice_that_was_made(ask, database):
    with database.write() as tx:
        for _ in range(52):
            assert cancel_task(tx, some_task(tx, "crowded"), now())
        some_task(tx, "crowded")

    def shown(answer):
        section = answer.text[answer.text.index('<section id="tasks"') :].partition("</section>")[0]
        return [int(found) for found in re.findall(r'href="/tasks/crowded/(\d+)"', section)]

    assert shown(ask("/populations/crowded"))[:2] == [53, 52]
    assert shown(ask("/populations/crowded?status=CREATED")) == [53]
    first = ask("/populations/crowded?status=CANCELED&range=day")
    assert shown(first) == list(range(52, 2, -1))
    older = unescape(re.search(r'href="([^"]+)">Older tasks', first.text)[1])
    second = ask(older)
    assert shown(second) == [2, 1]
    assert 'value="CANCELED" selected' in second.text
    assert "<option selected>day</option>" in second.text
    none = ask("/populations/crowded?status=FAILED")
    assert "No task in this state." in none.text
    assert shown(ask("/populations/crowded?status=NONSENSE")) == shown(ask("/populations/crowded"))


def test_a_population_without_a_round_says_so(ask, chart, database):
    with database.write() as tx:
        some_task(tx, "fresh")
    said = words(ask("/populations/fresh"))
    assert "No round yet." in said
    for name in ("minutes", "over-time", "metric", "check-ins", "reports"):
        series, document = chart(name, "fresh")
        assert series == {}
        assert document["empty"]


def test_the_page_is_sent_again_when_a_device_did_something_and_only_then(ask, running, hand_made):
    running.api.open_task("moving", hand_made.process_of(), goal=2)
    running.api.wait(lambda: running.api.task("moving", 1)["iterations"])
    first = ask("/populations/moving")
    assert ask("/populations/moving", **{"if-none-match": first.headers["etag"]}).status_code == 304
    running.api.assignment("moving")
    second = ask("/populations/moving", **{"if-none-match": first.headers["etag"]})
    assert second.status_code == 200
    drawn = ask("/charts/populations/moving/minutes")
    assert drawn.json()["series"][0]["name"] == "assigned"
    assert ask("/charts/populations/moving/minutes", **{"if-none-match": drawn.headers["etag"]}).status_code == 304


def test_a_chart_is_a_table_as_well(ask, chart, task_id):
    answer = ask(f"/charts/populations/{NAME}/metric?metric={ACCURACY}&format=csv")
    assert answer.headers["content-type"].startswith("text/csv")
    series, _ = chart(f"metric?metric={ACCURACY}")
    lines = answer.text.splitlines()
    assert lines[0] == f"series,round,{ACCURACY}"
    assert lines[1:] == [f"{name},{x},{y}" for name, points in series.items() for x, y in points]


def test_names_of_populations_and_metrics_are_text(ask, chart, database):
    name, place = "'&;(alert)=$", "%27%26%3B%28alert%29%3D%24"
    with database.write() as tx:
        key = some_task(tx, name)
        record_metrics(tx, IterationKey(name, key.task_id, 1), {"a/<script>alert(1)</script>&x": 0.5}, now())
    answer = ask(f"/populations/{place}")
    assert answer.status_code == 200
    assert "<script>alert" not in answer.text
    assert "&#39;&amp;;(alert)=$</h1>" in answer.text
    # The last part of a metric's name is what people see; the address of its chart finds it again.
    address = unescape(re.search(r'data-chart="/charts/populations/[^"/]+/(metric[^"]*)"', answer.text)[1])
    series, _ = chart(address, place)
    assert series == {f"{name}/{key.task_id}-script>&x": [(1, 0.5)]}


@pytest.mark.parametrize("address", ["/populations/nobody", "/charts/populations/lived/nothing"])
def test_what_is_not_there_is_a_page_for_people_and_json_for_programs(ask, address):
    answer = ask(address)
    assert answer.status_code == 404
    assert "<h1" in answer.text
    assert ask(address, accept="application/json").json()["code"] == "not_found"
