"""The service: how many devices ask, what they are told, how long it takes."""

import re
from datetime import datetime, timedelta
from html import unescape

import pytest

from fedcompute.monitoring.pages.traffic import MOST_SERIES
from fedcompute.protos import task_pb2
from fedcompute.server.context import now
from fedcompute.storage.request_minutes import BUCKETS, CHECK_IN, REPORT, RequestMinute, add_request_minutes
from fedcompute.storage.tasks import create_task

MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module")
def serve(start_server, tmp_path_factory):
    """Starts a server over a data directory of its own."""
    return lambda: start_server(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def running(serve):
    return serve()


@pytest.fixture(scope="module")
def at():
    """`at(minutes)`: so many minutes before the tests began; far enough back that no request of a test is near."""
    base = now().replace(second=0, microsecond=0) - timedelta(hours=1)
    return lambda minutes: base - minutes * MINUTE


def minute(moment, endpoint, population, result, buckets):
    """Requests as a server stores them: place in BUCKETS -> how many."""
    counts = tuple(buckets.get(place, 0) for place in range(len(BUCKETS) + 1))
    return RequestMinute(moment, endpoint, population, result, sum(counts), 0.1, 0.1, counts)


@pytest.fixture(scope="module")
def stored(running, at):
    """Three minutes of two populations."""
    with running.app.state.context.database.write() as tx:
        for name in ("a", "b"):
            create_task(tx, _task(name), now())
        add_request_minutes(
            tx,
            [
                minute(at(3), CHECK_IN, "a", "CREATED", {0: 60}),
                minute(at(3), CHECK_IN, "b", "CREATED", {1: 30, 5: 30}),
                minute(at(1), CHECK_IN, "a", "NO_TASK_AVAILABLE", {2: 98, 9: 2}),
                minute(at(1), REPORT, "b", "COMPLETED", {3: 30}),
                minute(at(1), REPORT, "b", "FAILED_OPS_ERROR", {3: 3}),
            ],
        )


def _task(population):
    return task_pb2.Task(
        population_name=population,
        total_iteration=3,
        min_aggregation_size=2,
        max_aggregation_size=5,
        min_client_version="0",
        max_client_version="999999999",
    )


@pytest.fixture(scope="module")
def read():
    """A chart of a server's service: series by name, value by time, and the whole document."""

    def chart(one, address):
        answer = one.api.http.get(f"{one.settings.base_url}/charts/service/{address}")
        assert answer.status_code == 200, answer.text
        document = answer.json()
        return {
            series["name"]: {datetime.fromisoformat(x): y for x, y in zip(series["x"], series["y"], strict=True)}
            for series in document["series"]
        }, document

    return chart


def page(one, address="/service", **headers):
    return one.api.http.get(one.settings.base_url + address, headers={"accept": "text/html", **headers})


def tiles(answer):
    return {
        unescape(name): unescape(re.sub(r"<[^>]+>", "", value))
        for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", answer.text)
    }


def test_requests_a_second_are_those_of_each_minute(running, stored, read, at):
    series, document = read(running, "rate")
    assert series["check-ins"] == {at(4): 0, at(3): 2, at(2): 0, at(1): 100 / 60, at(0): 0}
    assert series["reports"] == {at(4): 0, at(3): 0, at(2): 0, at(1): 33 / 60, at(0): 0}
    assert document["y_title"] == "requests a second"


def test_outcomes_are_stacked_by_population_and_result(running, stored, read, at):
    series, document = read(running, "check-ins")
    assert (document["kind"], document["stacked"]) == ("bar", True)
    counted = {name: {moment: count for moment, count in points.items() if count} for name, points in series.items()}
    assert counted == {"a CREATED": {at(3): 60}, "b CREATED": {at(3): 60}, "a NO_TASK_AVAILABLE": {at(1): 100}}
    series, _ = read(running, "reports")
    assert {name: points[at(1)] for name, points in series.items()} == {"b COMPLETED": 30, "b FAILED_OPS_ERROR": 3}


def test_one_outcome_is_drawn_by_population_and_one_population_by_outcome(running, stored, read, at):
    series, document = read(running, "check-ins?result=CREATED")
    assert {name: points[at(3)] for name, points in series.items()} == {"a": 60, "b": 60}
    assert document["title"] == "Check-ins per minute: CREATED"
    series, document = read(running, "check-ins?population=a")
    assert set(series) == {"CREATED", "NO_TASK_AVAILABLE"}
    # An outcome has its colour whatever stands beside it.
    colours = {one["name"]: one["colour"] for one in document["series"]}
    alone = read(running, "check-ins?population=a&result=NO_TASK_AVAILABLE")[1]["series"]
    assert [(one["name"], one["colour"]) for one in alone] == [("NO_TASK_AVAILABLE", colours["NO_TASK_AVAILABLE"])]
    assert len(set(colours.values())) == 2
    assert read(running, "reports?result=FAILED_MODEL_COMPUTATION")[0] == {}


def test_latency_is_interpolated_and_a_minute_without_requests_is_a_gap(running, stored, read, at):
    series, document = read(running, "check-in-latency")
    # 60 below 1 ms, 30 from 1 to 2.5 ms, 30 from 25 to 50 ms: the 118.8th of 120 is 28.8 of 30 into the last.
    assert series["p50"] == {at(4): None, at(3): 1, at(2): None, at(1): pytest.approx(2.5 + 2.5 * 50 / 98), at(0): None}
    assert series["p99"][at(3)] == pytest.approx(25 + 25 * 28.8 / 30)
    assert series["p99"][at(1)] == pytest.approx(500 + 500 / 2)
    assert document["y_title"] == "milliseconds"
    assert set(read(running, "report-latency")[0]["p50"]) == {at(2), at(1), at(0)}


def test_a_month_is_drawn_in_intervals_that_the_axis_names(serve, read, at):
    one = serve()
    days = [at(24 * 60 * day) for day in range(29)]
    with one.app.state.context.database.write() as tx:
        for moment in days:
            add_request_minutes(tx, [minute(moment + n * MINUTE, CHECK_IN, "a", "CREATED", {0: 60}) for n in range(3)])
    series, document = read(one, "check-ins?range=30 days")
    assert document["y_title"] == "check-ins per minute, mean of 60 min"
    points = series["a CREATED"]
    assert len(points) <= 1000
    assert sum(points.values()) * 60 == pytest.approx(29 * 3 * 60)
    rate, document = read(one, "rate?range=30 days")
    assert document["y_title"] == "requests a second, mean of 60 min"
    assert {moment: 60 * value for moment, value in rate["check-ins"].items()} == pytest.approx(points)
    assert set(read(one, "check-ins?range=6 hours")[0]["a CREATED"]) < {at(n) for n in range(-5, 6 * 60)}


def test_the_many_that_ask_little_are_drawn_together(serve, read, at):
    one = serve()
    with one.app.state.context.database.write() as tx:
        add_request_minutes(
            tx, [minute(at(0), CHECK_IN, f"p{number:03}", "CREATED", {0: 1 + number}) for number in range(100)]
        )
    series, document = read(one, "check-ins")
    assert len(series) == MOST_SERIES + 1
    assert set(series) == {f"p{number:03} CREATED" for number in range(100 - MOST_SERIES, 100)} | {"others"}
    assert document["series"][-1]["name"] == "others"
    assert sum(points[at(0)] for points in series.values()) == 5050


def test_the_minute_under_way_is_in_tiles_and_charts_before_it_is_stored(serve, read):
    one = serve()
    assert "No device has asked for anything in the last 5 minutes." in page(one).text
    assert read(one, "rate")[0] == {}
    first = page(one)
    assert page(one, **{"if-none-match": first.headers["etag"]}).status_code == 304
    for _ in range(3):
        assert one.api.check_in("nobody").status_code == 200
    one.api.wait(lambda: read(one, "check-ins")[0])
    second = page(one, **{"if-none-match": first.headers["etag"]})
    assert second.status_code == 200
    found = tiles(second)
    assert float(found["Check-ins a minute"]) == pytest.approx(3, rel=0.7)
    assert found["Got an assignment"] == "0.0 %"
    assert found["Reported success"] == "–"
    series, _ = read(one, "check-ins")
    # A population that no task is for has no name here.
    ((name, points),) = series.items()
    assert name.startswith("unknown ")
    assert sum(points.values()) == 3
    assert sum(read(one, "rate")[0]["check-ins"].values()) * 60 == pytest.approx(3)
    assert [value for value in read(one, "check-in-latency")[0]["p99"].values() if value is not None]


def test_the_page_offers_the_populations_there_are_and_takes_no_other(running, stored):
    answer = page(running, "/service?population=b&range=week")
    options = re.search(r'<select id="population".*?</select>', answer.text)[0]
    assert re.findall(r"<option[^>]*>([^<]+)", options) == ["all", "a", "b", "unknown"]
    assert "<option selected>b</option>" in options
    assert "/charts/service/check-ins?range=week&amp;population=b" in answer.text
    strange = page(running, '/service?population="><script>alert(1)</script>&range=</select>')
    assert "<script>alert" not in strange.text
    assert "population=" not in "".join(re.findall(r'data-chart="([^"]*)"', strange.text))
    assert "<option selected>day</option>" in strange.text


def test_a_chart_that_is_not_there_is_not_found(running):
    assert page(running, "/charts/service/nothing").status_code == 404
