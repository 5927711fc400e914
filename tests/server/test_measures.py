"""What a server says of itself to Prometheus, and what its figures cannot be made to do."""

import re
import time
import uuid

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedcompute.protos import learning_pb2, task_assignments_pb2
from fedcompute.server import state_gauges
from fedcompute.server.measures import Measures
from fedcompute.server.rounds.update import update
from fedcompute.server.state_gauges import GAUGES, state
from fedcompute.storage import schema
from fedcompute.storage.request_minutes import request_minutes


def scrape(api, **headers):
    """Name -> its samples, as (labels, value)."""
    answer = httpx.get(f"{api.url}/metrics", headers=headers)
    assert answer.status_code == 200
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found, name, **labels):
    return sum(one for have, one in found.get(name, []) if labels.items() <= have.items())


def test_a_round_leaves_its_traces_in_the_figures(api, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("figures", process, goal=2, rounds=2, room=3)
    during = scrape(api)
    labels = {"population": "figures", "task": str(task_id)}
    assert value(during, "fedcompute_round_report_goal", **labels) == 2
    assert value(during, "fedcompute_tasks", status="OPEN") >= 1
    api.contribute("figures", body=b"no upload at all")
    for _ in range(2):
        api.contribute("figures", hand_made.update_of(process, hand_made.initial))
    api.wait_for("figures", task_id, "COMPLETED", iteration=1)
    found = scrape(api)
    assert value(found, "create_task_assignment_seconds_count", population="figures", result="CREATED") >= 3
    assert value(found, "create_task_assignment_seconds_sum", population="figures", result="CREATED") > 0
    assert value(found, "create_task_assignment_seconds_max", population="figures", result="CREATED") > 0
    assert value(found, "report_result_seconds_count", population="figures", result="COMPLETED") >= 3
    assert value(found, "fedcompute_rounds_total", population="figures", end="completed") == 1
    assert value(found, "fedcompute_contributions_total", population="figures", result="accepted") == 2
    rejected = [one for have, one in found["fedcompute_contributions_total"] if have["result"] != "accepted"]
    assert sum(rejected) >= 1
    assert value(found, "fedcompute_round_phase_seconds_count", phase="collecting") >= 1
    assert value(found, "fedcompute_jobs_total", kind="aggregate", outcome="done") >= 1
    assert value(found, "fedcompute_jobs_total", kind="update", outcome="done") >= 1
    assert value(found, "fedcompute_upload_bytes_total") > 0
    counted = {name for family in Measures(()).registry.collect() for name in (family.name, f"{family.name}_total")}
    families = {family.name for family in text_string_to_metric_families(httpx.get(f"{api.url}/metrics").text)}
    named = {name.removesuffix("_total") for name in GAUGES}
    # Every figure is a counted one or named in the list that the alerts are checked against.
    assert {one for one in families if one.startswith("fedcompute_")} - counted == named
    assert value(found, "fedcompute_scrape_complete") == 1
    assert value(found, "fedcompute_engine_alive") == 1
    check_in = "/taskassignment/v1/population/{population}"
    assert value(found, "http_server_requests_seconds_count", uri=check_in, method="POST", status="201") >= 3


def test_no_label_is_a_path_or_a_name_that_somebody_made_up(api):
    before = sum(len(samples) for samples in scrape(api).values())
    for _ in range(50):
        name = f"made-up-{uuid.uuid4()}"
        assert api.check_in(name).status_code == 200
        api.http.get(f"{api.url}/{name}")
        api.http.get(f"{api.url}/api/v1/tasks/{name}/1")
    found = scrape(api)
    assert "made-up" not in httpx.get(f"{api.url}/metrics").text
    assert value(found, "create_task_assignment_seconds_count", population="unknown") >= 50
    # A few for each of: the check-ins' timer, and the templates that were asked for the first time.
    assert sum(len(samples) for samples in found.values()) - before < 80


def test_ten_thousand_names_share_one_label():
    measures = Measures(("api",))
    measures.know(["digits"])
    for number in range(10_000):
        measures.device_request("check_in", f"name-{number}", "NO_ACTIVE_TASK_EXISTS", 0.001)
    measures.device_request("check_in", "digits", "CREATED", 0.001)
    text = measures.text().decode()
    populations = set(re.findall(r'create_task_assignment_seconds_count\{population="([^"]+)"', text))
    assert populations == {"unknown", "digits"}
    assert len(measures.recent()) <= 4


def test_a_device_that_is_turned_away_before_it_is_heard_counts_as_that(run_server):
    api = run_server(check_ins_per_address=0.001).api
    for _ in range(5):
        api.check_in("busy")
    assert value(scrape(api), "create_task_assignment_seconds_count", result="TURNED_AWAY") >= 1


def test_requests_are_in_the_database_after_an_orderly_end(run_server, tmp_path, hand_made):
    from datetime import UTC, datetime, timedelta

    from fedcompute.storage.database import Database

    running = run_server(data_dir=tmp_path / "kept")
    running.api.open_task("kept", hand_made.process_of())
    for _ in range(3):
        assert running.api.check_in("kept").status_code == 201
    running.stop()
    database = Database.open(running.settings.database)
    now = datetime.now(UTC)
    with database.read() as tx:
        found = request_minutes(tx, now - timedelta(minutes=5), now)
    database.close()
    assert sum(one.count for one in found if (one.population, one.result) == ("kept", "CREATED")) == 3
    assert sum(sum(one.buckets) for one in found) == sum(one.count for one in found)


def test_the_figures_need_a_viewers_key_where_keys_are_asked_for(run_server):
    from fedcompute.server.context import now
    from fedcompute.storage.api_keys import Role, create_api_key

    running = run_server(require_api_keys=True)
    assert httpx.get(f"{running.api.url}/metrics").status_code == 401
    with running.app.state.context.database.write() as tx:
        _, key = create_api_key(tx, Role.VIEWER, "prometheus", now())
    assert "fedcompute_tasks" in scrape(running.api, authorization=f"Bearer {key}")


@pytest.mark.parametrize("roles", [("api",), ("engine",)])
def test_every_role_gives_its_figures_out(run_server, postgresql_url, roles):
    found = scrape(run_server(database_url=postgresql_url, roles=roles).api)
    assert value(found, "fedcompute_build_info", roles=roles[0]) == 1
    assert ("fedcompute_engine_alive" in found) == (roles == ("engine",))
    assert "process_resident_memory_bytes" in found


def test_a_report_counts_as_what_the_device_said_if_it_was_heard(api, hand_made):
    results = task_assignments_pb2.ReportResultRequest
    api.open_task("reports", hand_made.process_of(), goal=5, room=10)
    ineligible, later = api.assignment("reports"), api.assignment("reports")
    assert api.report(ineligible, results.NOT_ELIGIBLE).status_code == 200
    # A number of a later protocol, and a success of a session that is over.
    assert api.report(later, 99).status_code == 200
    assert api.report(ineligible, results.COMPLETED).status_code == 404
    found = scrape(api)
    told = {
        have["result"]: count for have, count in found["report_result_seconds_count"] if have["population"] == "reports"
    }
    assert told == {"NOT_ELIGIBLE": 1, "UNKNOWN": 1, "HTTP_404": 1}


def test_no_series_is_given_out_twice(api):
    for name, samples in scrape(api).items():
        labels = [tuple(sorted(have.items())) for have, _ in samples]
        assert len(set(labels)) == len(labels), name


def test_a_task_that_waits_and_a_round_that_collects_show_for_how_long_and_how_far(api, hand_made):
    waiting = api.create_task("unbuilt").task_id
    task_id = api.open_task("collecting", hand_made.process_of(), goal=4, room=8)
    api.assignment("collecting")

    def seen():
        found = scrape(api)
        return found if value(found, "fedcompute_round_assignments", population="collecting") else None

    # What is known of the state is up to five seconds old.
    found = api.wait(seen)
    assert value(found, "fedcompute_task_created_seconds", population="unbuilt", task=str(waiting)) > 0
    labels = {"population": "collecting", "task": str(task_id)}
    assert value(found, "fedcompute_round_status_seconds", status="COLLECTING", **labels) > 0
    assert value(found, "fedcompute_round_report_goal", **labels) == 4
    assert value(found, "fedcompute_round_assignments", status="ASSIGNED", **labels) == 1
    assert value(found, "fedcompute_rounds_under_way", status="COLLECTING") >= 1
    assert value(found, "fedcompute_round_excess", population="collecting") == 0


def test_more_contributions_in_a_sum_than_it_is_divided_by_are_told(run_server, hand_made, make_gate):
    gate = make_gate(update)
    running = run_server(gate)
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=2))
    running.api.open_task("biased", process, goal=2)
    for _ in range(2):
        running.api.contribute("biased", hand_made.update_of(process, [0 * leaf for leaf in hand_made.initial]))
    assert gate.reached.wait(30)
    context = running.app.state.context
    with context.database.write() as tx:
        # No server does this to itself.
        tx.execute(schema.aggregation_batch.update().values(accepted_size=5))
    (excess,) = [one for one in state(context) if one.name == "fedcompute_round_excess"]
    assert [(one.labels["population"], one.value) for one in excess.samples] == [("biased", 3)]


def test_a_database_that_hangs_costs_a_scrape_two_seconds_and_shows(
    run_server, postgresql, postgresql_url, monkeypatch
):
    monkeypatch.setattr(state_gauges, "_KEPT", 0.0)
    running = run_server(database_url=postgresql_url)
    assert value(scrape(running.api), "fedcompute_scrape_complete") == 1
    with postgresql.frozen():
        time.sleep(state_gauges._PATIENCE)
        start = time.monotonic()
        found = scrape(running.api)
        assert time.monotonic() - start < 10
    assert value(found, "fedcompute_scrape_complete") == 0
    assert value(found, "fedcompute_part_ready", part="database") == 0
    assert value(found, "fedcompute_part_ready", part="blobs") == 1
    assert "fedcompute_tasks" in found
    assert value(found, "fedcompute_database_seconds_count", kind="read") > 0
