import csv
import io

import pytest

from fedcompute.protos import plan_pb2, task_pb2
from fedcompute.tensors.checkpoint import read_checkpoint

PROTOBUF = {"accept": "application/x-protobuf"}


@pytest.fixture(scope="module")
def finished(api, hand_made):
    """A task of two rounds that has completed: (population, id)."""
    process = hand_made.process_of()
    task_id = api.open_task("finished", process, goal=1, rounds=2)
    for iteration in (1, 2):
        api.contribute("finished", hand_made.update_of(process, hand_made.initial))
        api.wait_for("finished", task_id, "COMPLETED", iteration=iteration)
    api.wait_for("finished", task_id, "COMPLETED")
    return "finished", task_id


def get(api, path, status=200, **options):
    response = api.http.get(f"{api.url}/api/v1/{path}", **options)
    assert response.status_code == status, response.text
    return response


def all_pages(api, path, name, limit):
    found, after, lengths = [], None, []
    while True:
        page = get(api, path, params={"limit": limit, **({} if after is None else {"after": after})}).json()
        found += page[name]
        lengths.append(len(page[name]))
        after = page["next"]
        if after is None:
            return found, lengths


def test_the_list_of_tasks_is_read_page_by_page(run_server):
    api = run_server().api
    for population in ("b", "a", "c"):
        for _ in range(2):
            task = api.create_task(population)
            api.http.post(f"{api.url}/api/v1/tasks/{population}/{task.task_id}/cancel")
    api.create_task("b")
    found, lengths = all_pages(api, "tasks", "tasks", 3)
    assert [(one["population"], one["task_id"]) for one in found] == [
        ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("c", 1), ("c", 2),
    ]  # fmt: skip
    assert lengths == [3, 3, 1]
    created = get(api, "tasks", params={"status": "CREATED"}).json()["tasks"]
    assert [(one["population"], one["task_id"]) for one in created] == [("b", 3)]
    both = get(api, "tasks", params={"status": ["created", "canceled"], "population": "b"}).json()["tasks"]
    assert len(both) == 3


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "after=x", "after=/1", "after=p/x", "after=%00", "status=asleep"]
)
def test_a_page_that_cannot_be_is_refused(api, query):
    assert get(api, f"tasks?{query}", 400).json()["code"] == "malformed_request"


def test_a_task_is_shown_as_json_and_as_a_message(api, finished):
    population, task_id = finished
    shown = get(api, f"tasks/{population}/{task_id}").json()["task"]
    response = get(api, f"tasks/{population}/{task_id}", headers=PROTOBUF)
    assert response.headers["content-type"] == "application/x-protobuf"
    task = task_pb2.GetTaskByIdResponse.FromString(response.content).task
    assert (task.population_name, task.task_id, task.total_iteration) == (population, task_id, 2)
    assert task.status == task_pb2.TaskStatus.COMPLETED
    assert shown["status"] == "COMPLETED"
    assert task.stop_time.ToJsonString()[:19] == shown["stopped"][:19]


def test_task_management_speaks_json_to_who_asks_for_it(api):
    url = f"{api.url}/taskmanagement/v1/population/json"
    task = {
        "total_iteration": 3, "min_aggregation_size": "2", "maxAggregationSize": 4,
        "min_client_version": "0", "max_client_version": "9", "info": {"training_info": {}, "traffic_weight": 7},
    }  # fmt: skip
    accept = {"accept": "application/json"}
    response = api.http.post(f"{url}:create-task", json={"task": task}, headers=accept)
    assert response.status_code == 200, response.text
    created = response.json()["task"]
    assert (created["task_id"], created["status"], created["min_aggregation_size"]) == ("1", "CREATED", "2")
    assert len(created["server_phase_url"]) == 1
    assert api.http.get(f"{url}/tasks/1:get", headers=accept).json()["task"]["info"]["traffic_weight"] == "7"
    canceled = api.http.post(f"{url}/tasks/1:cancel", headers=accept).json()["task"]
    assert canceled["status"] == "CANCELED"
    for body in (b"{", b'{"task": {"nothing": 1}}', b"[" * 10_000, b"\xff", b""):
        refused = api.http.post(f"{url}:create-task", content=body, headers={"content-type": "application/json"})
        assert refused.status_code == 400, body


def test_states_change_over_the_short_paths_too(api, hand_made):
    task_id = api.open_task("states", hand_made.process_of())
    base = f"{api.url}/api/v1/tasks/states/{task_id}"
    for verb, status, message in (
        ("pause", "PAUSED", task_pb2.TaskStatus.PAUSED),
        ("resume", "OPEN", task_pb2.TaskStatus.OPEN),
        ("cancel", "CANCELED", task_pb2.TaskStatus.CANCELED),
    ):
        assert api.http.post(f"{base}/{verb}").json()["task"]["status"] == status
        shown = api.http.get(base, headers=PROTOBUF).content
        assert task_pb2.GetTaskByIdResponse.FromString(shown).task.status == message
    assert api.http.post(f"{base}/pause").status_code == 409
    assert api.http.post(f"{base}/cancel", headers=PROTOBUF).headers["content-type"] == "application/x-protobuf"


def test_progress_tells_where_a_task_is_and_how_fast_it_goes(api, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("moving", process, goal=2, room=4, rounds=3)
    path = f"tasks/moving/{task_id}/progress"
    begun = get(api, path).json()
    (one,) = begun["rounds"]
    assert (begun["status"], begun["rounds_completed"], begun["rounds_total"]) == ("OPEN", 0, 3)
    assert (begun["rounds_per_hour"], begun["seconds_left"]) == (None, None)
    assert (one["iteration_id"], one["status"], one["contributions"], one["report_goal"]) == (1, "COLLECTING", 0, 2)
    api.assignment("moving")
    api.contribute("moving", hand_made.update_of(process, hand_made.initial))
    (half,) = api.wait(lambda: [r for r in get(api, path).json()["rounds"] if r["contributions"]])
    assert half["assignments"] == {"ASSIGNED": 1, "UPLOAD_COMPLETED": 1}
    assert half["contributions_per_minute"] > 0
    assert half["seconds_open"] >= half["seconds_in_status"] > 0
    for iteration in (1, 2):
        for _ in range(2):
            api.contribute("moving", hand_made.update_of(process, hand_made.initial))
        api.wait_for("moving", task_id, "COMPLETED", iteration=iteration)
    later = get(api, path).json()
    assert later["rounds_completed"] == 2
    assert later["rounds_per_hour"] > 0
    assert later["seconds_left"] > 0
    api.http.post(f"{api.url}/api/v1/tasks/moving/{task_id}/cancel")
    ended = get(api, path).json()
    assert (ended["status"], ended["rounds"], ended["seconds_left"]) == ("CANCELED", [], None)


def test_rounds_and_metrics_are_read_page_by_page(api, finished):
    population, task_id = finished
    rounds, lengths = all_pages(api, f"tasks/{population}/{task_id}/iterations", "iterations", 1)
    assert [(one["iteration_id"], one["attempt_id"], one["status"]) for one in rounds] == [
        (1, 0, "COMPLETED"),
        (2, 0, "COMPLETED"),
    ]
    assert lengths == [1, 1]
    assert all(one["completed"] for one in rounds)
    metrics, lengths = all_pages(api, f"tasks/{population}/{task_id}/metrics", "metrics", 1)
    whole = api.task(population, task_id)["metrics"]
    assert [{name: one[name] for name in ("iteration_id", "name", "value")} for one in metrics] == whole
    assert len(lengths) == 2
    assert whole


def test_metrics_come_as_csv_to_who_asks_for_it(api, finished):
    population, task_id = finished
    path = f"tasks/{population}/{task_id}/metrics"
    wanted = get(api, path).json()["metrics"]
    for options in ({"params": {"format": "csv"}}, {"headers": {"accept": "text/csv"}}):
        response = get(api, path, **options)
        assert response.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(response.text)))
        assert [(int(row["iteration_id"]), row["name"], float(row["value"])) for row in rows] == [
            (one["iteration_id"], one["name"], one["value"]) for one in wanted
        ]
    assert get(api, path, params={"format": "csv", "limit": 1}).headers["x-next"] == "1"
    assert get(api, path, 400, params={"format": "xml"}).json()["code"] == "malformed_request"


def test_every_listed_artifact_can_be_downloaded_and_says_what_it_is(api, finished):
    population, task_id = finished
    listed, lengths = all_pages(api, f"tasks/{population}/{task_id}/artifacts", "artifacts", 2)
    assert [(one["name"], one["iteration_id"]) for one in listed] == [
        ("plan", None), ("client-plan", None), ("checkpoint", 0), ("client-checkpoint", 0), ("checkpoint", 1),
        ("client-checkpoint", 1), ("checkpoint", 2), ("client-checkpoint", 2),
    ]  # fmt: skip
    assert lengths == [6, 2]
    for one in listed:
        response = api.http.get(api.url + one["path"])
        assert response.status_code == 200, response.text
        if one["iteration_id"] is not None:
            assert response.headers["x-iteration"] == str(one["iteration_id"])
            assert read_checkpoint(response.content)
        assert one["stored_bytes"] > 0
    plan = get(api, f"tasks/{population}/{task_id}/client-plan").content
    assert plan_pb2.ClientOnlyPlan.FromString(plan).tflite_graph == b"TFL3"


def test_a_checkpoint_that_was_deleted_is_not_listed_and_its_download_says_so(run_server, hand_made):
    running = run_server()
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("purged", process, goal=1, rounds=1)
    api.contribute("purged", hand_made.update_of(process, hand_made.initial))
    api.wait_for("purged", task_id, "COMPLETED")
    (running.settings.data_dir / f"blobs/model/purged/{task_id}/1/s/0/checkpoint").unlink()
    listed = get(api, f"tasks/purged/{task_id}/artifacts").json()["artifacts"]
    assert ("checkpoint", 1) not in [(one["name"], one["iteration_id"]) for one in listed]
    assert get(api, f"tasks/purged/{task_id}/checkpoint", 404).json()["code"] == "not_found"


@pytest.mark.parametrize(
    "path", ["progress", "iterations", "metrics", "artifacts", "plan", "client-plan", "checkpoint", "client-checkpoint"]
)
def test_what_belongs_to_no_task_is_not_found(api, path):
    assert get(api, f"tasks/nobody/1/{path}", 404).json()["code"] == "not_found"
    assert get(api, f"tasks/nobody/x/{path}", 400).json()["code"] == "malformed_request"


def test_keys_are_made_and_ended_over_http(run_server):
    running = run_server(require_api_keys=True)
    from fedcompute.server.context import now
    from fedcompute.storage.api_keys import Role, create_api_key

    with running.app.state.context.database.write() as tx:
        _, first = create_api_key(tx, Role.OPERATOR, "first", now())
    url, headers = f"{running.api.url}/api/v1", {"authorization": f"Bearer {first}"}
    http = running.api.http
    made = http.post(f"{url}/api-keys", json={"label": "ci", "role": "builder", "days": 1.5}, headers=headers)
    assert made.status_code == 201, made.text
    key, text = made.json()["api_key"], made.json()["key"]
    assert http.get(f"{url}/caller", headers={"x-api-key": text}).json() == {
        "actor": f"{key['id']} (ci)",
        "role": "builder",
    }
    listed = http.get(f"{url}/api-keys", headers=headers)
    assert [one["label"] for one in listed.json()["api_keys"]] == ["first", "ci"]
    assert text not in listed.text
    assert http.delete(f"{url}/api-keys/{key['id']}", headers=headers).status_code == 200
    assert http.delete(f"{url}/api-keys/{key['id']}", headers=headers).status_code == 404
    assert http.get(f"{url}/caller", headers={"x-api-key": text}).status_code == 401
    for wrong in (
        {}, {"label": "x"}, {"label": "", "role": "viewer"}, {"label": "x" * 41, "role": "viewer"},
        {"label": "a\nb", "role": "viewer"}, {"label": "x", "role": "root"}, {"label": "x", "role": ["viewer"]},
        {"label": "x", "role": "viewer", "days": 0}, {"label": "x", "role": "viewer", "days": "1"},
        {"label": "x", "role": "viewer", "days": 1e9}, [],
    ):  # fmt: skip
        assert http.post(f"{url}/api-keys", json=wrong, headers=headers).status_code == 400, wrong


@pytest.mark.parametrize("status", ["OPEN", "COMPLETED", "CANCELED", "FAILED", "PAUSED"])
def test_nobody_creates_a_task_in_a_status_that_it_has_not_earned(api, status):
    task = task_pb2.Task(
        total_iteration=1, min_aggregation_size=1, max_aggregation_size=1,
        min_client_version="0", max_client_version="1",
        status=task_pb2.TaskStatus.Enum.Value(status),
    )  # fmt: skip
    body = task_pb2.CreateTaskRequest(task=task).SerializeToString()
    response = api.http.post(
        f"{api.url}/taskmanagement/v1/population/earned:create-task",
        content=body,
        headers={"content-type": "application/x-protobuf"},
    )
    assert (response.status_code, response.json()["code"]) == (400, "task_invalid")
    assert "status" in response.json()["message"]


def test_conflict_bad_argument_and_overflow_each_say_what_is_wrong_and_what_to_do(api, hand_made):
    task_id = api.open_task("reasons", hand_made.process_of())
    base = f"{api.url}/taskmanagement/v1/population/reasons"
    task = task_pb2.Task(
        total_iteration=1,
        min_aggregation_size=1,
        max_aggregation_size=1,
        min_client_version="0",
        max_client_version="1",
    )
    headers = {"content-type": "application/x-protobuf"}

    def create(**changes):
        wanted = task_pb2.Task()
        wanted.CopyFrom(task)
        wanted.MergeFrom(task_pb2.Task(**changes))
        return api.http.post(
            f"{base}:create-task", content=task_pb2.CreateTaskRequest(task=wanted).SerializeToString(), headers=headers
        )

    answers = [
        (create(), 409, "task_conflict"),
        (create(min_client_version="9" * 19 + "9"), 400, "task_invalid"),
        (api.http.post(f"{base}/tasks/{task_id}:resume"), 409, "task_conflict"),
        (api.http.get(f"{base}/tasks/{2**63}:get"), 400, "malformed_request"),
        (api.http.get(f"{base}/tasks/{2**63 - 1}:get"), 404, "not_found"),
    ]
    for response, status, code in answers:
        assert response.status_code == status, response.text
        document = response.json()
        assert document["code"] == code
        assert document["message"]
        assert document["remedy"]
