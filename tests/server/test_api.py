import logging
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from fedcompute.crypto.keys import parse_public_keys
from fedcompute.protos import federatedcompute_pb2, learning_pb2, plan_pb2, task_assignments_pb2, task_pb2

Rejection = federatedcompute_pb2.RejectionReason
Report = task_assignments_pb2.ReportResultRequest
PROTO = {"content-type": "application/x-protobuf"}


def rejection_of(response, message=task_assignments_pb2.CreateTaskAssignmentResponse):
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-protobuf"
    info = message.FromString(response.content).rejection_info
    assert 0 < info.retry_window.delay_min.ToMilliseconds() <= info.retry_window.delay_max.ToMilliseconds()
    return info


def check_in_url(api, population="nobody"):
    return f"{api.url}/taskassignment/v1/population/{population}:create-task-assignment"


def is_typed(response, status, code):
    """An error answer has the catalogue's status and a body that says what happened and what to do."""
    assert response.status_code == status, response.text
    document = response.json()
    assert document["code"] == code
    assert document["message"]
    assert document["remedy"]


def test_an_unknown_population_is_told_to_come_back_and_gets_no_error(api):
    info = rejection_of(api.check_in("nobody"))
    assert info.reason == Rejection.NO_ACTIVE_TASK_EXISTS
    assert info.retry_window.delay_min.ToMilliseconds() == 10


def test_a_wrong_client_version_is_told_so(api, hand_made):
    api.open_task("versions", hand_made.process_of())
    assert rejection_of(api.check_in("versions", version="-1")).reason == Rejection.CLIENT_VERSION_MISMATCH
    is_typed(api.check_in("versions", version="new"), 400, "malformed_request")


def test_a_full_round_turns_devices_away_and_never_takes_more_than_its_room(api, hand_made):
    api.open_task("full", hand_made.process_of(), goal=2, room=3)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: api.check_in("full"), range(12)))
    assert sorted(answer.status_code for answer in answers) == [200] * 9 + [201] * 3
    assert rejection_of(api.check_in("full")).reason == Rejection.NO_TASK_AVAILABLE


def test_an_assignment_names_what_a_device_needs(api, hand_made):
    info = task_pb2.TaskInfo(traffic_weight=100)
    policies = info.training_info.eligibility_task_info.eligibility_policies
    policies.add().min_sep_policy.minimum_separation = 3
    policies.add().data_availability_policy.min_example_count = 7
    task_id = api.open_task("com.example:app.Main", hand_made.process_of(), info=info)
    assignment = api.assignment("com.example:app.Main")

    assert assignment.population_name == "com.example:app.Main"
    assert (assignment.task_id, assignment.aggregation_id) == (str(task_id), "1")
    assert assignment.task_name == f"/population/com.example:app.Main/task/{task_id}"
    assert assignment.self_uri.endswith(f"/aggregation/1/task-assignment/{assignment.assignment_id}")
    assert not assignment.HasField("eligibility_task_info_signature")
    first, second = assignment.eligibility_task_info.eligibility_policies
    assert (first.min_sep_policy.current_index, first.min_sep_policy.minimum_separation) == (1, 3)
    assert second.data_availability_policy.min_example_count == 7
    assert assignment.example_selector.collection_uri == "app://examples"


@pytest.mark.parametrize(("claimed", "configured", "told"), [(0, None, 1), (0, 0, 1), (4, 2, 4), (2, 5, 5)])
def test_where_noise_hides_one_contribution_devices_are_told_to_make_no_second_one(
    api, hand_made, claimed, configured, told
):
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=1))
    process.privacy_claim.minimum_separation = claimed
    info = task_pb2.TaskInfo(traffic_weight=100)
    info.training_info.SetInParent()
    if configured is not None:
        policies = info.training_info.eligibility_task_info.eligibility_policies
        policies.add().min_sep_policy.minimum_separation = configured
    population = f"once-{claimed}-{configured}"
    api.open_task(population, process, info=info)
    (policy,) = api.assignment(population).eligibility_task_info.eligibility_policies
    assert (policy.min_sep_policy.current_index, policy.min_sep_policy.minimum_separation) == (1, told)


def test_an_evaluation_with_noised_metrics_has_a_device_once_a_round(api, hand_made):
    training = hand_made.process_of()
    trained = api.open_task("graded-once", training, goal=1, room=1)
    api.contribute("graded-once", hand_made.update_of(training, hand_made.initial))
    api.wait_for("graded-once", trained, "COMPLETED")
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = "graded-once"
    info.evaluation_info.training_task_id = trained
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    training.metric_noise.clip_norm, training.metric_noise.noise_multiplier = 100.0, 1.0
    evaluation = hand_made.evaluation_of(training, ["sparse_categorical_accuracy"])
    api.open_task("graded-once", evaluation, goal=1, room=1, info=info)
    (policy,) = api.assignment("graded-once").eligibility_task_info.eligibility_policies
    assert policy.min_sep_policy.minimum_separation == 1


def test_gzip_resources_announce_gzip_in_message_and_header(api, hand_made):
    api.open_task("resources", hand_made.process_of())
    assignment = api.assignment("resources")
    for resource in (assignment.plan, assignment.init_checkpoint):
        assert resource.uri.startswith(f"{api.url}/blobs/v1/model/resources/")
        assert resource.compression_format == federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP
        with api.http.stream("GET", resource.uri) as response:
            raw = b"".join(response.iter_raw())
        assert response.headers["content-encoding"] == "gzip"
        assert int(response.headers["content-length"]) == len(raw)
        assert raw[:2] == b"\x1f\x8b"
    plan = api.http.get(assignment.plan.uri).content
    assert plan_pb2.ClientOnlyPlan.FromString(plan).tflite_graph == b"TFL3"


def test_a_repeated_check_in_gets_the_same_assignment(api, hand_made):
    api.open_task("repeated", hand_made.process_of())
    headers = {"odp-idempotency-key": "1 - a", "fcp-owner-id-digest": "app/cls-AB"}
    answers = [api.check_in("repeated", headers=headers) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {201}
    parsed = [task_assignments_pb2.CreateTaskAssignmentResponse.FromString(answer.content) for answer in answers]
    assert len({one.task_assignment.assignment_id for one in parsed}) == 1
    other = api.check_in("repeated", headers={**headers, "fcp-owner-id-digest": "other/cls-AB"})
    again = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(other.content)
    assert again.task_assignment.assignment_id != parsed[0].task_assignment.assignment_id


def test_a_repeated_success_report_gets_a_fresh_url_of_the_same_object(api, hand_made):
    api.open_task("reports", hand_made.process_of())
    assignment = api.assignment("reports")
    one, two = (api.upload_instruction(assignment) for _ in range(2))
    assert urlsplit(one.upload_location).path == urlsplit(two.upload_location).path
    assert one.compression_format == federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP
    assert dict(one.extra_request_headers) == {
        "content-type": "application/octet-stream",
        "content-encoding": "gzip",
    }


def test_a_success_report_for_an_unknown_session_or_task_is_a_typed_404(api, hand_made):
    api.open_task("strangers", hand_made.process_of())
    assignment = api.assignment("strangers")
    good = assignment.self_uri
    for bad in (
        good[:-1] + "!",
        good.replace("/aggregation/1/", "/aggregation/2/"),
        good.replace("/task/1/", "/task/2/"),
        good.replace("/strangers/", "/others/"),
    ):
        assignment.self_uri = bad
        is_typed(api.report(assignment), 404, "assignment_not_active")
    assignment.self_uri = good.replace("/task/1/", "/task/x/")
    is_typed(api.report(assignment), 400, "malformed_request")


def test_failure_reports_are_answered_empty_and_counted_once(api, hand_made):
    task_id = api.open_task("failures", hand_made.process_of(), room=6)
    for result in (Report.FAILED, Report.NOT_ELIGIBLE, Report.FAILED_EXAMPLE_GENERATION):
        assignment = api.assignment("failures")
        for _ in range(2):
            response = api.report(assignment, result)
            assert (response.status_code, response.content) == (200, b"")
            assert response.headers["content-length"] == "0"
    assert api.report(assignment, 99).status_code == 200
    is_typed(api.report(assignment), 404, "assignment_not_active")
    counts = api.task("failures", task_id)["assignments"]
    assert counts == {"LOCAL_FAILED": 1, "LOCAL_NOT_ELIGIBLE": 1, "LOCAL_FAILED_EXAMPLE_GENERATION": 1}


def test_a_success_report_for_a_closed_round_is_a_retry_window(api, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("closed", process, goal=1, room=2)
    late = api.assignment("closed")
    api.contribute("closed", hand_made.update_of(process, hand_made.initial))
    api.wait_for("closed", task_id, "COMPLETED")
    info = rejection_of(api.report(late), task_assignments_pb2.ReportResultResponse)
    assert info.reason == Rejection.NO_TASK_AVAILABLE
    assert api.task("closed", task_id)["assignments"] == {"UPLOAD_COMPLETED": 1, "CANCELED": 1}


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"\xff\xff\xff", PROTO, 400, "malformed_request"),
        (b"", PROTO, 400, "malformed_request"),
        (b"\n\x03\n\x011", {"content-type": "application/json"}, 415, "unsupported_media_type"),
        (b"\n\x03\n\x011", {}, 415, "unsupported_media_type"),
        (bytes(100_000), PROTO, 413, "request_too_large"),
        (iter([bytes(50_000)] * 3), PROTO, 413, "request_too_large"),
    ],
)
def test_a_bad_body_is_refused_with_its_reason(api, body, headers, status, code):
    is_typed(api.http.post(check_in_url(api), content=body, headers=headers), status, code)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/taskassignment/v1/population/p:create-task-assignment", 405),
        ("POST", "/taskassignment/v1/population/p:create-something", 404),
        ("POST", "/taskassignment/v1/population/p", 404),
        ("POST", "/taskassignment/v1/population/:create-task-assignment", 404),
        ("GET", "/nothing", 404),
        ("GET", "/taskmanagement/v1/population/p/tasks/x:get", 400),
        ("GET", "/taskmanagement/v1/population/p/tasks/1:get", 404),
        ("GET", "/taskmanagement/v1/population/p/tasks/99999999999999999999:get", 400),
        ("GET", "/api/v1/tasks/p/1", 404),
    ],
)
def test_every_error_answer_has_a_body_and_its_length(api, method, path, status):
    response = api.http.request(method, api.url + path, content=b"x" if method == "POST" else None, headers=PROTO)
    assert response.status_code == status
    assert int(response.headers["content-length"]) == len(response.content) > 0
    assert response.json()["code"]


@pytest.fixture
def instruction(api, hand_made):
    """A fresh upload instruction."""
    population = "blobs"
    if api.check_in(population).status_code != 201:
        api.open_task(population, hand_made.process_of(), goal=100, room=1000)
    return api.upload_instruction(api.assignment(population))


def test_a_forged_or_changed_url_is_refused(api, instruction):
    url, headers = instruction.upload_location, dict(instruction.extra_request_headers)
    flipped = url[:-1] + ("0" if url[-1] != "0" else "1")
    for forged in (flipped, url.split("?")[0], url.replace("/gradient/", "/model/")):
        is_typed(api.http.put(forged, content=b"x", headers=headers), 403, "bad_signature")
    is_typed(api.http.get(url, headers=headers), 403, "bad_signature")
    is_typed(api.http.put(url, content=b"x"), 403, "bad_signature")


def test_an_expired_url_is_refused(run_server, hand_made):
    api = run_server(signed_url_life=0.001).api
    api.open_task("expired", hand_made.process_of())
    instruction = api.upload_instruction(api.assignment("expired"))
    api.wait(lambda: api.upload(instruction, b"x").status_code == 403)
    is_typed(api.upload(instruction, b"x"), 403, "url_expired")


def test_an_upload_is_limited_in_size_and_not_empty(run_server, hand_made):
    api = run_server(max_upload_bytes=1000).api
    api.open_task("limits", hand_made.process_of())
    instruction = api.upload_instruction(api.assignment("limits"))
    is_typed(api.upload(instruction, bytes(1001)), 413, "request_too_large")
    is_typed(api.upload(instruction, iter([bytes(600)] * 2)), 413, "request_too_large")
    is_typed(api.upload(instruction, b""), 400, "malformed_request")
    assert api.upload(instruction, bytes(1000)).status_code == 200


def test_a_repeated_upload_is_well_and_changes_nothing(run_server, hand_made):
    running = run_server()
    api = running.api
    task_id = api.open_task("twice", hand_made.process_of(), goal=2)
    instruction = api.upload_instruction(api.assignment("twice"))
    assert api.upload(instruction, b"first").status_code == 200
    api.wait(lambda: api.task("twice", task_id)["assignments"].get("UPLOAD_COMPLETED"))
    assert api.upload(instruction, b"second").status_code == 200
    stored = list((running.settings.data_dir / "blobs" / "gradient").rglob("gradient"))
    assert [path.read_bytes() for path in stored if path.is_file()] == [b"first"]


def test_an_upload_that_breaks_off_leaves_nothing(run_server, hand_made):
    running = run_server()
    running.api.open_task("broken-off", hand_made.process_of())
    instruction = running.api.upload_instruction(running.api.assignment("broken-off"))

    def body():
        yield bytes(1000)
        raise RuntimeError("the network went away")

    with pytest.raises(RuntimeError, match="went away"):
        running.api.upload(instruction, body())
    gradients = running.settings.data_dir / "blobs" / "gradient"
    assert not [path for path in gradients.rglob("gradient") if path.is_file()]


def test_artifacts_of_an_open_task_cannot_be_replaced(api, hand_made):
    process = hand_made.process_of()
    task = api.create_task("frozen")
    from fedcompute.learning.specification import initial_state
    from fedcompute.tensors.checkpoint import write_checkpoint

    state = write_checkpoint(initial_state(process, hand_made.initial, ()))
    assert api.http.put(task.init_checkpoint_url[0], content=state).status_code == 200
    assert api.http.put(task.server_phase_url[0], content=hand_made.plan_of(process)).status_code == 200
    assert api.http.put(task.client_only_plan_url[0], content=hand_made.client_plan()).status_code == 200
    api.wait_for("frozen", task.task_id, "OPEN")
    is_typed(api.http.put(task.server_phase_url[0], content=b"other"), 409, "task_conflict")


def test_a_second_active_task_of_a_kind_is_a_conflict_and_a_bad_task_names_its_faults(api):
    api.create_task("single")
    url = f"{api.url}/taskmanagement/v1/population/single:create-task"
    sizes = {"total_iteration": 1, "min_aggregation_size": 1, "max_aggregation_size": 1}
    task = task_pb2.Task(**sizes, min_client_version="0", max_client_version="1")
    body = task_pb2.CreateTaskRequest(task=task).SerializeToString()
    is_typed(api.http.post(url, content=body, headers=PROTO), 409, "task_conflict")
    bad = task_pb2.CreateTaskRequest(task=task_pb2.Task(min_aggregation_size=5)).SerializeToString()
    response = api.http.post(url, content=bad, headers=PROTO)
    is_typed(response, 400, "task_invalid")
    assert "total_iteration" in response.json()["message"]


def test_a_created_task_says_where_its_artifacts_go_and_a_canceled_one_does_not(api):
    task = api.create_task("canceled")
    assert task.status == task_pb2.TaskStatus.CREATED
    base = f"{api.url}/taskmanagement/v1/population/canceled/tasks/{task.task_id}"
    found = task_pb2.GetTaskByIdResponse.FromString(api.http.get(f"{base}:get").content).task
    assert [len(urls) for urls in (found.client_only_plan_url, found.server_phase_url, found.init_checkpoint_url)] == [
        1,
        1,
        1,
    ]
    response = api.http.post(f"{base}:cancel")
    assert response.status_code == 200
    canceled = task_pb2.GetTaskByIdResponse.FromString(response.content).task
    assert canceled.status == task_pb2.TaskStatus.CANCELED
    assert not canceled.client_only_plan_url


def test_canceling_a_task_ends_its_round(api, hand_made):
    task_id = api.open_task("ended", hand_made.process_of())
    late = api.assignment("ended")
    api.http.post(f"{api.url}/taskmanagement/v1/population/ended/tasks/{task_id}:cancel")
    assert rejection_of(api.check_in("ended")).reason == Rejection.NO_ACTIVE_TASK_EXISTS
    rejection_of(api.report(late), task_assignments_pb2.ReportResultResponse)
    assert api.task("ended", task_id)["iterations"][0]["status"] == "CANCELED"


def test_the_task_list_shows_every_task_with_its_newest_round(api, hand_made):
    task_id = api.open_task("listed", hand_made.process_of())
    listed = api.http.get(f"{api.url}/api/v1/tasks", params={"population": "listed"}).json()["tasks"]
    (one,) = listed
    assert (one["task_id"], one["status"], one["kind"]) == (task_id, "OPEN", "TRAINING")
    assert one["newest_iteration"]["status"] == "COLLECTING"


def test_the_plan_and_initial_checkpoint_of_a_task_can_be_read_back(api, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("readback", process)
    assert api.http.get(f"{api.url}/api/v1/tasks/readback/{task_id}/plan").content == hand_made.plan_of(process)
    assert "server/finalizer/learning_rate" in api.checkpoint("readback", task_id, 0)


def test_published_keys_are_the_same_for_everyone_and_say_how_long_to_remember_them(api):
    url = f"{api.url}/.well-known/odp/v1/public-keys"
    one, two = api.http.get(url), api.http.get(url)
    assert parse_public_keys(one.content) == parse_public_keys(two.content)
    assert one.headers["cache-control"] == "public, max-age=604800"


def test_keys_rotate_and_old_ones_still_open_uploads(run_server, hand_made):
    running = run_server(key_rotation=0.5, key_max_age=60)
    api = running.api
    process = hand_made.process_of()
    task_id = api.open_task("rotation", process, goal=1)
    body = api.seal(hand_made.update_of(process, hand_made.initial))
    url = f"{api.url}/.well-known/odp/v1/public-keys"
    first = {key.id for key in parse_public_keys(api.http.get(url).content)}
    api.wait(lambda: not first & {key.id for key in parse_public_keys(api.http.get(url).content)})
    api.contribute("rotation", body=body)
    assert api.wait_for("rotation", task_id, "COMPLETED")["rejections"] == {}


def test_readiness_is_about_database_blobs_and_engine(run_server):
    running = run_server()
    assert running.api.http.get(f"{running.api.url}/healthz").status_code == 200
    assert running.api.http.get(f"{running.api.url}/ready").status_code == 200
    store = running.settings.data_dir / "blobs"
    store.rename(store.with_name("gone"))
    store.write_text("in the way")
    # An answer may be a second old.
    running.api.wait(lambda: running.api.http.get(f"{running.api.url}/ready").status_code == 503)
    assert running.api.http.get(f"{running.api.url}/ready").json()["problems"].keys() == {"blobs"}
    store.unlink()
    store.with_name("gone").rename(store)
    running.api.wait(lambda: running.api.http.get(f"{running.api.url}/ready").status_code == 200)


@pytest.mark.parametrize("path", ["/%00", "/api/v1/tasks/a%00b/1", "/api/v1/tasks?population=%00"])
def test_a_nul_in_path_or_query_is_a_typed_400_whatever_the_database(api, path):
    response = api.http.get(api.url + path)
    assert response.status_code == 400
    assert response.json()["code"] == "malformed_request"


def test_a_long_header_passes(api):
    headers = {"odp-authentication-key": "x" * 20_000}
    assert api.check_in("nobody", headers=headers).status_code == 200


def test_an_unexpected_error_is_a_500_with_a_request_id_and_one_traceback(run_server, hand_made, caplog):
    running = run_server()
    running.api.open_task("odd", hand_made.process_of())
    # A context that is not there is the nearest thing to a fault of our own.
    context = running.app.state.context
    running.app.state.context = None
    with caplog.at_level(logging.ERROR):
        response = running.api.check_in("odd")
    running.app.state.context = context
    assert response.status_code == 500
    assert response.headers["x-request-id"] in response.json()["message"]
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert errors[0].exc_info


def test_no_signature_reaches_the_log(api, hand_made, caplog):
    process = hand_made.process_of()
    with caplog.at_level(logging.DEBUG):
        task_id = api.open_task("quiet", process, goal=1)
        assignment = api.contribute("quiet", hand_made.update_of(process, hand_made.initial))
        api.wait_for("quiet", task_id, "COMPLETED")
    # The client library of the test logs the URLs that it requests; the server must not.
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert any("/blobs/v1/gradient/quiet/" in message for message in ours)
    assert not [message for message in ours if "signature=" in message or assignment.assignment_id in message]


def test_several_servers_share_nothing(run_server, tmp_path):
    one, two = run_server(data_dir=tmp_path / "1"), run_server(data_dir=tmp_path / "2")
    one.api.create_task("shared")
    assert httpx.get(f"{two.api.url}/api/v1/tasks").json()["tasks"] == []
