"""A round's page: its attempts, devices, batches and results are what the API and the database say of them."""

import re
from datetime import datetime, timedelta
from html import unescape
from itertools import pairwise
from random import Random
from urllib.parse import quote
from uuid import UUID

import numpy as np
import pytest
from sqlalchemy import func, insert, select

from fedcompute.errors import CATALOGUE, Reason
from fedcompute.monitoring.pages.charts import MOST_POINTS
from fedcompute.monitoring.pages.round_charts import EDGES, histogram
from fedcompute.protos import learning_pb2, task_assignments_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.storage import schema
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.tasks import cancel_task, create_task

NAME = "lived"
ASSIGNED, REPORTED, UPLOADED, UNFIT = (
    AssignmentStatus.ASSIGNED,
    AssignmentStatus.LOCAL_COMPLETED,
    AssignmentStatus.UPLOAD_COMPLETED,
    AssignmentStatus.LOCAL_NOT_ELIGIBLE,
)


@pytest.fixture(scope="module")
def running(start_server, tmp_path_factory):
    return start_server(tmp_path_factory.mktemp("round"), collector_batch_size=1)


@pytest.fixture(scope="module")
def api(running):
    return running.api


@pytest.fixture(scope="module")
def database(running):
    return running.app.state.context.database


@pytest.fixture(scope="module")
def ask(api):
    """Asks for an address; returns the answer."""

    def asked(address, accept="text/html", **headers):
        return api.http.get(api.url + address, headers={"accept": accept, **headers})

    return asked


@pytest.fixture(scope="module")
def process(hand_made):
    return hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=2))


@pytest.fixture(scope="module")
def update(hand_made, process):
    return hand_made.update_of(process, [np.full(leaf.shape, 0.01) for leaf in hand_made.initial])


@pytest.fixture(scope="module")
def lived(api, hand_made, process, update):
    """Two rounds of two devices; in the first, one device more could not train and one sent what is not finite."""
    task_id = api.open_task(NAME, process, goal=2, rounds=2, room=3)
    failed = api.assignment(NAME)
    result = task_assignments_pb2.ReportResultRequest.FAILED_OPS_ERROR
    assert api.report(failed, result).status_code == 200
    api.contribute(NAME, hand_made.update_of(process, [np.full(leaf.shape, np.nan) for leaf in hand_made.initial]))
    for number in (1, 2):
        for _ in range(2):
            api.contribute(NAME, update)
        api.wait_for(NAME, task_id, "COMPLETED", number)
    api.wait_for(NAME, task_id, "COMPLETED")
    return TaskKey(NAME, task_id)


@pytest.fixture(scope="module")
def crowded(database):
    """A round of many devices whose task was canceled; returns the round and its sessions, with what they came to.

    Of every eleven devices ten uploaded; the others were not eligible.
    """
    begin = now() - timedelta(hours=3)
    with database.write() as tx:
        task = some_task(tx, "crowded")
        first = open_round(tx, task, begin)
        drawn = Random(7)
        sessions = {str(UUID(int=drawn.getrandbits(128))): UPLOADED if number % 11 else UNFIT for number in range(2200)}
        rows, history = [], []
        for number, (session, status) in enumerate(sessions.items()):
            place = dict(zip(schema.ASSIGNMENT_COLUMNS, (*place_of(first), session), strict=True))
            # From half a second to some hours.
            report = begin + timedelta(seconds=0.5 * (1 + number % 7) ** 4)
            rows.append(
                place
                | {
                    "status": int(status),
                    "status_id": 3,
                    "status_time": report,
                    "created_time": begin,
                    "correlation_id": session,
                }
            )
            steps = [(ASSIGNED, begin)]
            if status is UPLOADED:
                steps += [(REPORTED, report), (UPLOADED, report + timedelta(milliseconds=number))]
            else:
                steps += [(status, report)]
            history += [
                place | {"status_id": at + 1, "status": int(step), "created_time": moment, "batch_id": None}
                for at, (step, moment) in enumerate(steps)
            ]
        tx.execute(insert(schema.assignment), rows)
        tx.execute(insert(schema.assignment_status_history), history)
        # A task that is over is left alone by the round engine.
        assert cancel_task(tx, task, now())
    return first, sessions


def place_of(key):
    return key.population, key.task_id, key.iteration_id, key.attempt_id


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


def open_round(tx, task, moment):
    key = IterationKey(task.population, task.task_id, 1)
    values = dict(zip(schema.ITERATION_COLUMNS, place_of(key), strict=True))
    status = {"status": int(IterationStatus.COLLECTING), "status_id": 1, "aggregation_level": 0}
    fixed = {"base_iteration_id": 0, "base_on_result_id": 0, "result_id": 1, "report_goal": 2, "info": {}}
    limits = {"max_aggregation_size": 5, "min_client_version": "0", "max_client_version": "99"}
    times = {"status_time": moment, "created_time": moment}
    tx.execute(insert(schema.iteration).values(**values, **status, **fixed, **limits, **times))
    tx.execute(insert(schema.iteration_status_history).values(**values, **status, created_time=moment))
    return key


def words(answer):
    """What a page says, without its markup."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", answer.text)))


def part(answer, section):
    """One live part of a page."""
    return answer.text.partition(f'<section id="{section}"')[2].partition("</section>")[0]


def rows_of(text):
    """The rows of tables, as lists of what their cells say."""
    rows = re.findall(r"<tr><td.*?</tr>", text, re.DOTALL)
    plain = [[re.sub(r"<[^>]+>", " ", cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows]
    return [[" ".join(unescape(cell).split()) for cell in row] for row in plain]


def first_arrivals(database, key, *statuses):
    """Session -> status -> when it first came to it."""
    history = schema.assignment_status_history
    query = select(history.c.session_id, history.c.status, func.min(history.c.created_time)).where(
        schema.of_task(history, key), history.c.iteration_id == 1, history.c.status.in_([int(one) for one in statuses])
    )
    found = {}
    with database.read() as tx:
        for session, status, moment in tx.execute(query.group_by(history.c.session_id, history.c.status)):
            found.setdefault(session, {})[status] = moment
    return found


def test_the_page_has_the_numbers_of_the_api(ask, api, lived):
    view = api.task(lived.population, lived.task_id)
    one = view["iterations"][0]
    answer = ask(f"/tasks/{lived}/rounds/1")
    said = words(answer)
    assert f"Contributions {one['assignments']['UPLOAD_COMPLETED']} of {one['report_goal']}" in said
    assert f"Devices assigned {sum(one['assignments'].values())} at most {one['max_aggregation_size']}" in said
    assert {name.upper().replace(" ", "_"): int(count) for name, count in rows_of(part(answer, "states"))[:-1]} == one[
        "assignments"
    ]
    assert rows_of(part(answer, "states"))[-1] == ["not finite", "1", CATALOGUE[Reason.NOT_FINITE].remedy]
    metrics = {row["name"]: row["value"] for row in view["metrics"] if row["iteration_id"] == 1}
    results = rows_of(part(answer, "results"))
    assert results[: len(metrics)] == [[name, f"{value:,.4g}"] for name, value in sorted(metrics.items())]
    ledger = ask(f"/api/v1/populations/{NAME}/ledger", accept="application/json").json()["entries"]
    entries = [row for row in ledger if row["iteration_id"] == 1]
    assert len(entries) == 2
    assert [row[0] for row in results[len(metrics) :]] == [str(row["sequence"]) for row in entries]
    assert results[len(metrics)][-1] == f"{entries[0]['cumulative_epsilon']:,.4g}"
    batches = rows_of(part(answer, "batches"))
    assert sorted(row[2:4] for row in batches) == [["1", "0"], ["1", "1"], ["1", "1"]]
    address = unescape(re.search(r'href="(/api/v1/[^"]+checkpoint[^"]+)"', answer.text)[1])
    assert ask(address, accept="*/*").headers["x-iteration"] == "1"


def test_the_timeline_says_when_each_phase_began_and_how_long_it_took(ask, database, lived):
    history = schema.iteration_status_history
    query = select(history.c.status, history.c.created_time).where(
        schema.of_task(history, lived), history.c.iteration_id == 1
    )
    with database.read() as tx:
        steps = tx.execute(query.order_by(history.c.status_id)).all()
    answer = ask(f"/tasks/{lived}/rounds/1")
    rows = rows_of(part(answer, "timeline"))
    assert [row[:2] for row in rows] == [
        [IterationStatus(status).name.lower().replace("_", " "), f"{moment:%Y-%m-%d %H:%M:%S}"]
        for status, moment in steps
    ]
    spans = [(after - before).total_seconds() for (_, before), (_, after) in pairwise(steps)]
    told = [float(row[2].split()[0]) / (1000 if row[2].endswith("ms") else 1) for row in rows[: len(spans)]]
    assert told == pytest.approx(spans, abs=0.005)
    shares = [float(one) for one in re.findall(r"flex-grow: ([0-9.]+)", answer.text)]
    assert shares == pytest.approx([max(span / sum(spans), 0.004) for span in spans])


def test_uploads_and_training_times_are_those_of_the_sessions(ask, database, lived):
    found = first_arrivals(database, lived, ASSIGNED, REPORTED, UPLOADED)
    moments = sorted(steps[UPLOADED] for steps in found.values() if UPLOADED in steps)
    contributions, goal = ask(f"/charts/tasks/{lived}/arrivals?round=1").json()["series"]
    assert [datetime.fromisoformat(one) for one in contributions["x"]] == moments
    assert contributions["y"] == [1, 2, 3]
    assert goal["y"] == [2, 2]
    trained = [(steps[REPORTED] - steps[ASSIGNED]).total_seconds() for steps in found.values() if REPORTED in steps]
    (bars,) = ask(f"/charts/tasks/{lived}/durations?round=1").json()["series"]
    names, counts = histogram(trained)
    assert (bars["x"], bars["y"]) == (names, counts)
    assert sum(bars["y"]) == 3


def test_a_histogram_counts_every_value_once_in_its_interval():
    assert histogram([]) == ([], [])
    assert histogram([0.1, 0.149, 0.15, 0.3]) == (
        ["0.1 to 0.15", "0.15 to 0.2", "0.2 to 0.3", "0.3 to 0.5"],
        [2, 1, 0, 1],
    )
    names, counts = histogram([0.0, *EDGES, 1e9])
    assert counts == [1] * (len(EDGES) - 1) + [1, 2]
    assert (names[0], names[-1]) == ("below 0.01", f"from {EDGES[-1]:g}")
    assert len(set(names)) == len(EDGES) + 1


def test_a_crowd_is_drawn_with_no_more_points_than_a_screen_has(ask, crowded):
    first, sessions = crowded
    task = f"{first.population}/{first.task_id}"
    uploads = sum(status is UPLOADED for status in sessions.values())
    contributions, _ = ask(f"/charts/tasks/{task}/arrivals?round=1").json()["series"]
    assert len(contributions["x"]) <= MOST_POINTS
    assert contributions["x"] == sorted(contributions["x"])
    assert (contributions["y"][0], contributions["y"][-1]) == (1, uploads)
    (bars,) = ask(f"/charts/tasks/{task}/durations?round=1").json()["series"]
    assert sum(bars["y"]) == uploads
    assert len(bars["x"]) < 40


def test_assignments_are_paged_by_state_and_no_session_is_shown_whole(ask, crowded):
    first, sessions = crowded
    address, shown, pages = f"/tasks/{first.population}/{first.task_id}/rounds/1?status=LOCAL_NOT_ELIGIBLE", [], []
    while address:
        answer = ask(address)
        assert not any(session in answer.text for session in sessions)
        rows = rows_of(part(answer, "assignments"))
        pages.append(len(rows))
        shown += [row[0] for row in rows]
        assert {row[1] for row in rows} == {"local not eligible"}
        assert '<option value="LOCAL_NOT_ELIGIBLE" selected>' in answer.text
        link = re.search(r'href="([^"]+)">More<', answer.text)
        address = unescape(link[1]).partition("#")[0] if link else None
    assert pages == [100, 100]
    unfit = [session for session, status in sessions.items() if status is UNFIT]
    assert shown == [session[:8] for session in sorted(unfit)]
    none = ask(f"/tasks/{first.population}/{first.task_id}/rounds/1?status=LOCAL_TIMEOUT")
    assert "No single assignment is kept in this state." in words(none)
    assert '<option value="LOCAL_TIMEOUT" selected>' in none.text


def test_every_attempt_is_told_with_its_reason_and_what_to_do(ask, database):
    begin = now() - timedelta(hours=2)
    with database.write() as tx:
        task = some_task(tx, "again")
        first = open_round(tx, task, begin)
        collecting = IterationStatus.COLLECTING
        second = open_attempt(
            tx,
            first,
            old=collecting,
            ended=IterationStatus.CANCELED,
            into=collecting,
            reason=Reason.ROUND_EXPIRED,
            now=begin + timedelta(hours=1),
        )
        assert second.attempt_id == 1
        assert cancel_task(tx, task, now())
    answer = ask(f"/tasks/{task}/rounds/1")
    titles = [
        " ".join(unescape(re.sub(r"<[^>]+>", " ", one)).split()) for one in re.findall(r"<h3>.*?</h3>", answer.text)
    ]
    assert titles[:2] == ["Attempt 2 canceled", "Attempt 1 canceled (round expired)"]
    assert f"round expired. What to do: {CATALOGUE[Reason.ROUND_EXPIRED].remedy}" in words(answer)
    assert ["collecting", f"{begin:%Y-%m-%d %H:%M:%S}", "60 min"] in rows_of(part(answer, "timeline"))
    assert "No device has been assigned yet." in words(answer)
    assert "The round has released nothing yet." in words(answer)
    assert "checkpoint" not in part(answer, "results")


def test_a_round_under_way_is_sent_again_with_each_device_and_batch_and_only_then(ask, api, process, update):
    task_id = api.open_task("moving", process, goal=2, rounds=1)
    api.wait(lambda: api.task("moving", task_id)["iterations"])
    path = f"/tasks/moving/{task_id}/rounds/1"
    first = ask(path)
    assert "No device has been assigned yet." in words(first)
    assert "No upload is being added up yet." in words(first)
    assert 'data-announce="Round 1 is collecting"' in first.text
    latest = [first]

    def fresh():
        """The page as a browser has it that asks whether it changed."""
        answer = ask(path, **{"if-none-match": latest[-1].headers["etag"]})
        assert answer.status_code in (200, 304)
        if answer.status_code == 200:
            latest.append(answer)
        return latest[-1]

    assert fresh() is first
    api.contribute("moving", update)
    api.wait(lambda: [row[1:4] for row in rows_of(part(fresh(), "batches"))] == [["upload completed", "1", "1"]])
    assert "Contributions 1 of 2" in words(latest[-1])
    api.contribute("moving", update)
    api.wait(lambda: 'data-announce="Round 1 is completed"' in fresh().text)
    api.wait_for("moving", task_id, "COMPLETED")
    assert "Contributions 2 of 2" in words(fresh())


def test_a_batch_that_changes_alone_is_on_the_page(ask, api, database, process, update):
    task_id = api.open_task("counting", process, goal=2, rounds=1)
    path, batch = f"/tasks/counting/{task_id}/rounds/1", schema.aggregation_batch
    api.contribute("counting", update)
    api.wait(lambda: [row[3] for row in rows_of(part(ask(path), "batches"))] == ["1"])
    tag = {"if-none-match": ask(path).headers["etag"]}
    assert ask(path, **tag).status_code == 304
    with database.write() as tx:
        tx.execute(batch.update().where(schema.of_task(batch, TaskKey("counting", task_id))).values(accepted_size=0))
    answer = ask(path, **tag)
    assert answer.status_code == 200
    assert [row[3] for row in rows_of(part(answer, "batches"))] == ["0"]


def test_rounds_lead_to_their_neighbours(ask, lived):
    def led(number):
        text = ask(f"/tasks/{lived}/rounds/{number}").text
        return re.findall(rf'href="/tasks/{lived}/rounds/(\d+)">[^<]*Round', text)

    assert led(1) == ["2"]
    assert led(2) == ["1"]


def test_names_of_populations_are_text(ask, database):
    name = "'&;(alert)=$"
    with database.write() as tx:
        task = some_task(tx, name)
        open_round(tx, task, now())
        assert cancel_task(tx, task, now())
    answer = ask(f"/tasks/{quote(name, safe='')}/{task.task_id}/rounds/1")
    assert answer.status_code == 200
    assert f"&#39;&amp;;(alert)=$ task {task.task_id} round 1" in answer.text
    assert name not in answer.text
    for address in re.findall(r'data-chart="([^"]+)"', answer.text):
        assert ask(unescape(address)).json()["series"] == []


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/tasks/lived/1/rounds/9", 404),
        ("/tasks/nobody/1/rounds/1", 404),
        ("/tasks/lived/1/rounds/x", 400),
        ("/charts/tasks/nobody/1/arrivals?round=1", 404),
        ("/charts/tasks/nobody/1/durations?round=1", 404),
    ],
)
def test_what_is_not_there_is_a_page_for_people_and_json_for_programs(ask, lived, address, status):
    answer = ask(address)
    assert answer.status_code == status
    assert "<h1" in answer.text
    assert ask(address, accept="application/json").json()["code"] in ("not_found", "malformed_request")


@pytest.mark.parametrize("number", ["", "x", "²", "9" * 30, "9"])
def test_a_chart_of_no_round_is_empty_and_says_so(ask, lived, number):
    for name in ("arrivals", "durations"):
        document = ask(f"/charts/tasks/{lived}/{name}?round={number}").json()
        assert document["series"] == []
        assert document["empty"]
