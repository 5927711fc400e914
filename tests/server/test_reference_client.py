"""Phones, as spec/device.md describes them, against our server: whole runs, repetitions, refusals, accidents."""

import base64
import gzip
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from fedcompute.protos import federatedcompute_pb2, learning_pb2, task_assignments_pb2, task_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

Report = task_assignments_pb2.ReportResultRequest
Rejection = federatedcompute_pb2.RejectionReason
STEP = 0.25


@pytest.fixture
def make_phone(api, reference, hand_made):
    """Phones that train by hand: an update that moves every weight by `STEP`, in the form that their task wants."""

    def make(process=None, server=None, **options):
        process = process if process is not None else hand_made.process_of()

        def compute(plan, checkpoint):
            told = read_checkpoint(checkpoint)
            weights = [told[name] for name in sorted(told) if "/trainable/" in name] or hand_made.initial
            deltas = [np.full(weight.shape, -STEP, np.float32) for weight in weights]
            return write_checkpoint(hand_made.update_of(process, deltas))

        return reference.ReferenceClient((server or api).url, options.pop("compute", compute), **options)

    return make


def has_succeeded(run):
    assert run.succeeded, run
    return run


@pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "plain"])
def test_phones_train_two_rounds(run_server, make_phone, hand_made, encrypt):
    api = run_server(allow_plaintext_uploads=not encrypt).api
    process = hand_made.process_of()
    task_id = api.open_task("training", process, goal=3, rounds=2, room=3)
    for _ in range(2):
        for _ in range(3):
            api.wait(lambda: make_phone(process, api, encrypt=encrypt).run("training").succeeded)
    found = api.wait_for("training", task_id, "COMPLETED")
    assert found["rejections"] == {}
    before, after = (api.checkpoint("training", task_id, number) for number in (0, 2))
    moved = [after[name] - before[name] for name in before if "trainable" in name and before[name].dtype == np.float32]
    assert moved
    assert any(np.abs(change).max() > STEP / 2 for change in moved)


def test_a_plain_upload_is_taken_and_costs_nobody_but_its_sender(api, make_phone, hand_made):
    """The store answers 200: a phone must not repeat what a repetition cannot mend."""
    task_id = api.open_task("openly", hand_made.process_of(), goal=1, room=4)
    has_succeeded(make_phone(encrypt=False).run("openly"))
    api.wait(lambda: api.task("openly", task_id)["rejections"])
    assert api.task("openly", task_id)["rejections"] == {"upload_not_encrypted": 1}
    has_succeeded(make_phone().run("openly"))
    assert api.wait_for("openly", task_id, "COMPLETED")["assignments"] == {"REMOTE_FAILED": 1, "UPLOAD_COMPLETED": 1}


@pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "plain"])
def test_phones_evaluate_a_released_model(run_server, make_phone, hand_made, encrypt):
    api = run_server(allow_plaintext_uploads=not encrypt).api
    training = hand_made.process_of()
    trained = api.open_task("evaluated", training, goal=1, room=1)
    has_succeeded(make_phone(training, api, encrypt=encrypt).run("evaluated"))
    api.wait_for("evaluated", trained, "COMPLETED")
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = "evaluated"
    info.evaluation_info.training_task_id = trained
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    evaluation = hand_made.evaluation_of(training, ["sparse_categorical_accuracy"])
    task_id = api.open_task("evaluated", evaluation, goal=2, room=2, info=info)
    for _ in range(2):
        api.wait(lambda: make_phone(evaluation, api, encrypt=encrypt).run("evaluated").succeeded)
    assert api.wait_for("evaluated", task_id, "COMPLETED")["rejections"] == {}


def test_no_request_of_a_run_carries_more_or_fewer_headers_than_a_phone_sends(api, make_phone, hand_made):
    """And each is answered on a connection that the phone closes."""
    api.open_task("headers", hand_made.process_of(), goal=1)
    phone = make_phone()
    has_succeeded(phone.run("headers"))
    platform = {"user-agent", "host", "connection", "accept-encoding"}
    own = [
        (one.method, {line.split(b":")[0].decode().lower() for line in one.head.split(b"\r\n")[1:-2]} - platform)
        for one in phone.sent
    ]
    message = {"content-type", "content-length"}
    assert own == [
        ("POST", message | {"odp-idempotency-key", "fcp-owner-id-digest"}),
        ("GET", set()),
        ("GET", set()),
        ("GET", set()),
        ("PUT", message),
        ("PUT", {"content-type", "content-encoding", "content-length"}),
    ]
    assert {one.status for one in phone.sent} == {200, 201}


LEGAL = "com.example:app.Main._~@!$&'()*+,;=-v1:create-task-assignment:x"


def test_a_population_of_every_legal_character_works_unencoded(api, make_phone, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task(LEGAL, process, goal=1, room=1)
    phone = make_phone(process)
    run = has_succeeded(phone.run(LEGAL))
    assert run.assignment.population_name == LEGAL
    assert phone.sent[0].head.startswith(f"POST /taskassignment/v1/population/{LEGAL}:create-task-assignment ".encode())
    api.wait_for(LEGAL, task_id, "COMPLETED")


def test_a_percent_encoded_population_is_the_same_population(api, hand_made):
    api.open_task("com.example:encoded", hand_made.process_of())
    for name in ("com.example%3Aencoded", "%63om.example:encoded"):
        answer = api.check_in(name)
        assert answer.status_code == 201
        message = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(answer.content)
        assert message.task_assignment.population_name == "com.example:encoded"


def test_a_phone_that_asks_too_often_is_not_eligible_and_says_so(api, make_phone, hand_made):
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=10.0, noise_multiplier=1e-3, report_goal=1))
    process.privacy_claim.minimum_separation = 5
    task_id = api.open_task("separated", process, goal=1, rounds=2, room=2)
    phone = make_phone(process)
    has_succeeded(phone.run("separated"))
    api.wait_for("separated", task_id, "COLLECTING", iteration=2)
    second = api.wait(lambda: (run := phone.run("separated")).assignment and run)
    assert (second.succeeded, second.counted, second.cause) == (False, False, "not eligible")
    assert api.task("separated", task_id)["assignments"]["LOCAL_NOT_ELIGIBLE"] == 1


@pytest.mark.parametrize("result", [Report.FAILED, Report.FAILED_EXAMPLE_GENERATION, Report.FAILED_MODEL_COMPUTATION])
def test_a_failed_computation_frees_its_place(api, make_phone, hand_made, result):
    population = f"failing-{result}"
    api.open_task(population, hand_made.process_of(), goal=1, room=1)
    run = make_phone(compute=lambda plan, checkpoint: result).run(population)
    assert (run.succeeded, run.counted) == (False, False)
    has_succeeded(make_phone().run(population))


def test_windows_below_a_second_reach_the_phone(run_server, make_phone):
    from fedcompute.server.settings import RetryWindow

    api = run_server(retry_no_active_task=RetryWindow(0.0015, 0.25)).api
    run = make_phone(server=api).run("nobody")
    assert (run.counted, run.window_ms) == (False, (1, 250))
    assert 1 <= run.delay_ms <= 250


def test_a_full_round_and_a_wrong_version_count_no_failure(api, make_phone, hand_made):
    api.open_task("turned-away", hand_made.process_of(), goal=1, room=1)
    run = make_phone(version="-1").run("turned-away")
    assert (run.counted, run.window_ms) == (False, (86_400_000, 172_800_000))
    api.assignment("turned-away")
    run = make_phone().run("turned-away")
    assert (run.succeeded, run.counted, run.window_ms) == (False, False, (10, 20))


def test_a_report_for_a_closed_round_drops_the_update_and_counts_no_failure(api, make_phone, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("late", process, goal=1, room=2)
    slow = make_phone(process)
    assignment = slow.check_in("late")
    has_succeeded(make_phone(process).run("late"))
    api.wait_for("late", task_id, "COMPLETED")
    run = slow.report(assignment, Report.COMPLETED)
    assert (run.succeeded, run.counted, run.window_ms) == (False, False, (10, 20))
    assert slow.sent[-1].status == 200
    assert len([one for one in slow.sent if one.method == "PUT"]) == 1


def lost(*which):
    """Loses the answers to the first two attempts of the named requests."""
    return lambda method, url, attempt: attempt < 3 and any(re.search(one, url) for one in which)


@pytest.mark.parametrize("which", [":create-task-assignment$", ":report-result$", "/blobs/v1/gradient/"])
def test_answers_lost_twice_change_nothing(run_server, make_phone, hand_made, which):
    api = run_server().api
    process = hand_made.process_of()
    task_id = api.open_task("lossy", process, goal=2, room=2)
    phone = make_phone(process, api, lose=lost(which))
    has_succeeded(phone.run("lossy"))
    assert [bool(re.search(which, one.url)) for one in phone.sent].count(True) == 3
    # The one place that is left is there for another phone.
    has_succeeded(make_phone(process, api).run("lossy"))
    found = api.wait_for("lossy", task_id, "COMPLETED")
    assert found["assignments"] == {"UPLOAD_COMPLETED": 2}


@pytest.mark.parametrize("request_of", ["check-in", "report", "upload"])
def test_three_attempts_that_arrive_together_are_one(run_server, make_phone, hand_made, reference, request_of):
    api = run_server().api
    process = hand_made.process_of()
    task_id = api.open_task("at-once", process, goal=1, room=1)
    phone = make_phone(process, api)
    has_succeeded(phone.run("at-once"))
    api.wait_for("at-once", task_id, "COMPLETED")

    task_id = api.open_task("at-once", process, goal=2, room=2)
    phone.sent.clear()
    phone.lose = lambda method, url, attempt: True
    if request_of == "check-in":
        phone.run("at-once")
    else:
        phone.lose = lambda method, url, attempt: False
        assignment = phone.check_in("at-once")
        phone.sent.clear()
        instruction = phone.report(assignment, Report.COMPLETED).upload_instruction
        if request_of == "upload":
            phone.sent.clear()
            body = gzip.compress(phone.sealed(b"anything", phone._key()))
            phone.sent.clear()
            phone._request("PUT", instruction.upload_location, dict(instruction.extra_request_headers), body)
    one = phone.sent[0]
    port = int(api.url.rpartition(":")[2])
    with ThreadPoolExecutor(3) as threads:
        answers = list(
            threads.map(lambda _: reference.exchange("localhost", port, "http", one.head + one.body), range(9))
        )
    assert {status for status, _, _ in answers} <= {200, 201}
    counts = api.task("at-once", task_id)["assignments"]
    assert sum(counts.values()) == 1, counts


def test_a_new_key_is_a_new_request(api, hand_made, make_phone):
    """After a challenge the phone sends the same check-in with a new idempotency key."""
    task_id = api.open_task("renewed", hand_made.process_of(), goal=2)
    phone = make_phone()
    first, second = (phone.check_in("renewed") for _ in range(2))
    assert first.assignment_id != second.assignment_id
    assert api.task("renewed", task_id)["assignments"] == {"ASSIGNED": 2}


def test_downloads_are_whole_whatever_is_asked_of_them(api, hand_made):
    """Never a 206 or 304, which devices take for failures; HEAD is GET without the body."""
    api.open_task("whole", hand_made.process_of())
    url = api.assignment("whole").plan.uri
    whole = api.http.get(url)
    for headers in (
        {"range": "bytes=0-9"},
        {"if-none-match": "*"},
        {"if-modified-since": "Fri, 01 Jan 2100 00:00:00 GMT"},
        {"accept": "text/html"},
        {"accept-encoding": "identity"},
    ):
        part = api.http.get(url, headers=headers)
        assert (part.status_code, part.content) == (200, whole.content), headers
        assert part.headers["content-length"] == whole.headers["content-length"]
    head = api.http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.headers["content-encoding"] == "gzip"


class Scripted(BaseHTTPRequestHandler):
    """A server that answers from a list, to show that the client does what the text says."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status, headers, body = self.server.script.pop(0) if self.server.script else (500, {}, b"over")
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, *_):
        pass


@contextmanager
def scripted(*answers):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.script, server.seen = list(answers), []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(status, body=b"", **headers):
    return status, {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}, body


def challenged(status, challenge):
    info = federatedcompute_pb2.RejectionInfo(reason=Rejection.UNAUTHENTICATED)
    info.auth_metadata.key_attestation_metadata.challenge = challenge
    return said(status, task_assignments_pb2.CreateTaskAssignmentResponse(rejection_info=info).SerializeToString())


def test_the_client_answers_the_last_of_three_challenges_and_stores_its_token_before_it_is_accepted(reference):
    answered = []
    with scripted(*(challenged(401, bytes([n])) for n in (1, 2, 3)), *[said(401)] * 3) as server:
        phone = reference.ReferenceClient(
            f"http://localhost:{server.server_port}", None, answer=lambda c, t: answered.append(c) or "[]"
        )
        run = phone.run("p")
    assert answered == [b"\x03"]
    assert run.counted
    assert len(server.seen) == 6
    assert [seen[2].get("odp-authorization-key") for seen in server.seen] == [None] * 3 + [
        phone.tokens[phone.owner]
    ] * 3
    keys = [seen[2]["odp-idempotency-key"] for seen in server.seen]
    assert len(set(keys[:3])) == len(set(keys[3:])) == 1
    assert keys[0] != keys[3]
    assert re.fullmatch(r"\d{13} - [0-9a-f-]{36}", keys[0])


@pytest.mark.parametrize("status", [204, 202, 302, 400, 429, 500, 503])
def test_the_client_takes_every_status_but_200_and_201_for_a_failure_and_asks_three_times(reference, status):
    with scripted(*[said(status)] * 3) as server:
        run = reference.ReferenceClient(f"http://localhost:{server.server_port}", None).run("p")
    assert run.counted
    assert len(server.seen) == 3


def test_the_client_crashes_at_an_error_without_body_and_length(reference):
    with scripted((204, {}, b"")) as server:
        run = reference.ReferenceClient(f"http://localhost:{server.server_port}", None).run("p")
    assert run.cause.startswith("Crash")
    assert len(server.seen) == 1


def test_the_client_ignores_a_window_with_a_bound_of_zero(reference):
    info = federatedcompute_pb2.RejectionInfo()
    info.retry_window.delay_max.seconds = 5
    body = task_assignments_pb2.CreateTaskAssignmentResponse(rejection_info=info).SerializeToString()
    with scripted(said(200, body)) as server:
        run = reference.ReferenceClient(f"http://localhost:{server.server_port}", None).run("p")
    assert (run.counted, run.window_ms) == (False, None)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost", "ftp://localhost:1"])
def test_the_client_asks_no_other_url(reference, url):
    phone = reference.ReferenceClient(url, None)
    assert "not allowed" in phone.run("p").cause
    assert phone.sent == []


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"cache-control": "public, max-age=60"}, 60),
        ({"cache-control": "max-age=5, MAX-AGE=60", "age": "10"}, 50),
        ({"cache-control": "max-age=60", "age": "60"}, 1_209_600),
        ({}, 1_209_600),
    ],
)
def test_the_client_remembers_keys_as_long_as_it_is_told(reference, headers, expected):
    assert reference._max_age(headers) == expected


def test_a_phone_remembers_our_keys_for_as_long_as_we_say_and_asks_again_then(api, make_phone, hand_made):
    api.open_task("remembering", hand_made.process_of(), goal=1, room=9)
    phone = make_phone()
    for _ in range(2):
        phone.check_in("remembering")
        assert phone._key() is not None
    assert len([one for one in phone.sent if one.url.endswith("public-keys")]) == 1
    name, (key, _) = next(iter(phone.keys.items()))
    phone.keys[name] = key, 0.0
    assert phone._key() is not None
    assert len([one for one in phone.sent if one.url.endswith("public-keys")]) == 2


def test_the_hpke_of_the_client_opens_with_ours(reference):
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from fedcompute.crypto.envelope import open_update

    secret = X25519PrivateKey.generate()
    phone = reference.ReferenceClient("http://localhost:1", None)
    body = gzip.compress(phone.sealed(b"an update / of bytes", ("key/1", secret.public_key().public_bytes_raw())))
    assert b"\\/" in gzip.decompress(body)
    opened = open_update(body, {"key/1": secret.private_bytes_raw()}, allow_plaintext=False, limit=1000)
    assert opened == b"an update / of bytes"
    assert json.loads(gzip.decompress(body))["associatedData"] == base64.b64encode(b"{}").decode() == "e30="
