"""Devices that prove themselves over HTTP: the dance of challenge and answer, and every way to get it wrong."""

import base64
import contextlib
import json
import logging
import sqlite3
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from fedcompute.protos import federatedcompute_pb2, learning_pb2, task_assignments_pb2
from fedcompute.server.rounds.passes import Passes
from fedcompute.server.security import authentication
from fedcompute.server.security.tokens import token_hash
from fedcompute.storage import schema

Rejection = federatedcompute_pb2.RejectionReason
Report = task_assignments_pb2.ReportResultRequest
CheckInAnswer = task_assignments_pb2.CreateTaskAssignmentResponse
ReportAnswer = task_assignments_pb2.ReportResultResponse
OWNER = "org.example/org.example.Worker-00"


@pytest.fixture
def server(run_server, roots_file, devices):
    """Starts a server that takes the kinds of device named."""

    def start(kinds="both", **changes):
        if kinds in ("attestation", "both") and "attestation_service_url" not in changes:
            changes["attestation_roots"] = roots_file
        if kinds in ("attestation", "both"):
            changes.setdefault("attestation_packages", (f"{devices.package}={devices.digest}",))
        return run_server(authentication=kinds, **changes)

    return start


@pytest.fixture
def enrol(devices):
    def make(api, **options):
        response = api.http.post(f"{api.url}/api/v1/enrolments", json={"label": "test"})
        assert response.status_code == 201, response.text
        assert response.headers["cache-control"] == "no-store"
        (made,) = response.json()["enrolments"]
        return devices.enrolled(api, made["id"], base64.b64decode(made["secret"]), **options)

    return make


@pytest.fixture
def device_of(server, enrol, maker, devices):
    """A server and a device of a kind."""

    def make(kind, **changes):
        running = server(kind, **changes)
        return running, enrol(running.api) if kind == "enrolment" else devices.attested(running.api, maker)

    return make


def info_of(response, message=CheckInAnswer):
    assert response.headers["content-type"] == "application/x-protobuf"
    return message.FromString(response.content).rejection_info


def is_turned_away(response, status, reason, message=CheckInAnswer):
    assert response.status_code == status, response.content
    info = info_of(response, message)
    assert info.reason == reason
    assert info.retry_window.delay_min.ToMilliseconds() == 60_000
    assert info.retry_window.delay_max.ToMilliseconds() == 300_000


def is_challenged(response, message=CheckInAnswer):
    assert response.status_code == 401, response.content
    assert info_of(response, message).reason == Rejection.UNAUTHENTICATED
    assert info_of(response, message).auth_metadata.key_attestation_metadata.challenge


def is_unknown(response):
    assert response.status_code == 404
    assert response.json()["code"] == "assignment_not_active"


def decisions(running):
    return running.app.state.context.authentication.counts.all()


def database(running):
    return running.app.state.context.database


def age_tokens(running, **ago):
    """Makes every token as old as it will be in a while."""
    with database(running).write() as tx:
        tx.execute(update(schema.authorization_token).values(expires=datetime.now(UTC) - timedelta(**ago)))


def open_task(running, hand_made, population="digits", **options):
    return running.api.open_task(population, hand_made.process_of(), **{"goal": 3, **options})


KINDS = pytest.mark.parametrize("kind", ["enrolment", "attestation"])


@KINDS
def test_a_device_answers_the_last_of_three_challenges_and_takes_part(device_of, hand_made, devices, kind):
    running, device = device_of(kind)
    open_task(running, hand_made)
    challenged = device.check_in("digits", attempts=3)
    is_challenged(challenged)
    assert decisions(running) == {"challenged": 3}
    admitted = device.check_in("digits", device.answer(challenged), attempts=3)
    assert admitted.status_code == 201
    assignment = devices.assignment_in(admitted)
    reported = device.report(assignment)
    assert reported.status_code == 200
    assert ReportAnswer.FromString(reported.content).upload_instruction.upload_location
    # The token is good for the next visit, without another word.
    assert device.check_in("digits").status_code in (200, 201)
    assert decisions(running)["challenged"] == 3


@KINDS
def test_an_answer_that_arrives_three_times_admits_once_and_assigns_once(device_of, hand_made, devices, kind):
    running, device = device_of(kind)
    open_task(running, hand_made)
    proof = device.answer(device.check_in("digits"))
    headers = {**device.headers(proof), "fcp-owner-id-digest": OWNER, "odp-idempotency-key": f"1 - {uuid.uuid4()}"}
    answers = [running.api.check_in("digits", headers=headers) for _ in range(3)]
    assert [one.status_code for one in answers] == [201] * 3
    assert len({devices.assignment_in(one).assignment_id for one in answers}) == 1
    with database(running).read() as tx:
        assert len(tx.execute(select(schema.authorization_token)).all()) == 1


@KINDS
def test_one_token_serves_every_population_of_its_owner_and_no_other_owner(device_of, hand_made, kind):
    running, device = device_of(kind)
    for population in ("digits", "letters:a.b"):
        open_task(running, hand_made, population)
    assert device.take_part("digits").population_name == "digits"
    assert device.check_in("letters:a.b").status_code == 201
    assert decisions(running)["challenged"] == 3
    device.owner = "org.example/org.example.Other-00"
    is_challenged(device.check_in("digits"))


@KINDS
def test_an_expired_token_is_challenged_and_showing_it_again_does_not_extend_its_life(device_of, hand_made, kind):
    running, device = device_of(kind)
    open_task(running, hand_made)
    device.take_part("digits")
    with database(running).read() as tx:
        before = tx.execute(select(schema.authorization_token)).one()
    assert before.expires - before.created == timedelta(days=7)
    device.check_in("digits")
    with database(running).read() as tx:
        assert tx.execute(select(schema.authorization_token)).one() == before
    age_tokens(running, seconds=1)
    is_challenged(device.check_in("digits"))


def test_a_proof_without_a_token_is_challenged_again(device_of):
    _, device = device_of("attestation")
    proof = device.answer(device.check_in("digits"))
    device.token = None
    is_challenged(device.check_in("digits", proof))


@KINDS
def test_a_bad_proof_is_refused_and_the_token_that_came_with_it_admits_nobody(device_of, stranger, kind):
    running, device = device_of(kind)
    if kind == "enrolment":
        device.secret = bytes(32)
    else:
        device.maker = stranger
    is_turned_away(device.check_in("digits", device.answer(device.check_in("digits"))), 403, Rejection.UNAUTHORIZED)
    is_challenged(device.check_in("digits"))
    reason = "enrolment_refused" if kind == "enrolment" else "attestation_untrusted"
    assert decisions(running) == {"challenged": 2, f"refused: {reason}": 1}


def test_a_device_that_could_not_attest_is_refused(device_of):
    _, device = device_of("attestation")
    device.answer(device.check_in("digits"))
    is_turned_away(device.check_in("digits", "[]"), 403, Rejection.UNAUTHORIZED)


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"boot_state": 2}, "attestation_device"),
        ({"locked": False}, "attestation_device"),
        ({"attestation_level": 0}, "attestation_device"),
        ({"packages": ("org.evil",)}, "attestation_package"),
        ({"digests": ("cd" * 32,)}, "attestation_package"),
    ],
)
def test_a_phone_that_is_not_as_it_must_be_is_refused(device_of, claims, reason):
    running, device = device_of("attestation")
    device.claims = claims
    is_turned_away(device.check_in("digits", device.answer(device.check_in("digits"))), 403, Rejection.UNAUTHORIZED)
    assert decisions(running)[f"refused: {reason}"] == 1


def test_each_kind_of_device_is_taken_only_where_the_setting_says_so(server, enrol, maker, devices, tmp_path):
    for kinds in ("enrolment", "attestation"):
        running = server(kinds, data_dir=tmp_path / kinds)
        other = enrol(running.api) if kinds == "attestation" else devices.attested(running.api, maker)
        is_turned_away(other.check_in("digits", other.answer(other.check_in("digits"))), 403, Rejection.UNAUTHORIZED)
        assert decisions(running)["refused: proof_not_taken"] == 1
    running = server("both", data_dir=tmp_path / "both")
    for device in (enrol(running.api), devices.attested(running.api, maker)):
        assert device.check_in("digits", device.answer(device.check_in("digits"))).status_code == 200


@pytest.mark.parametrize(
    "proof",
    ["", "{}", "null", "[1]", "[[]]", "not json", '["%%%"]', '["enrolment:v1"]', '["enrolment:v2", "a", "b"]',
     '["enrolment:v1", "a", "b", "c"]', json.dumps(["AAAA"] * 11), json.dumps(["A" * 30_000]), "[" * 10_000],
)  # fmt: skip
def test_a_proof_of_no_form_is_a_typed_refusal(api_of_both, proof):
    api = api_of_both
    headers = {
        "odp-authorization-key": str(uuid.uuid4()),
        "odp-authentication-key": proof,
        "fcp-owner-id-digest": OWNER,
    }
    response = api.check_in("digits", headers=headers)
    assert response.status_code == 400, response.content
    assert response.json()["code"] == "malformed_request"


@pytest.fixture
def api_of_both(server):
    return server("both").api


def test_tokens_and_owners_of_no_form_are_typed_refusals(server, enrol):
    running = server("both")
    device = enrol(running.api)
    for token in ("", "short", "x" * 65):
        proof = device.answer(device.check_in("digits"))
        device.token = token
        response = device.check_in("digits", proof)
        assert (response.status_code, response.json()["code"]) == (400, "malformed_request")
        is_challenged(device.check_in("digits"))
    for owner in ("", "x" * 1025):
        device.owner = owner
        assert device.check_in("digits").json()["code"] == "malformed_request"


def test_an_attestation_earns_one_token_however_often_it_is_shown(server, maker, devices):
    running = server("attestation")
    device = devices.attested(running.api, maker)
    proof = device.answer(device.check_in("digits"))
    assert device.check_in("digits", proof).status_code == 200
    thief = devices.attested(running.api, maker)
    thief.token = str(uuid.uuid4())
    is_turned_away(thief.check_in("digits", proof), 403, Rejection.UNAUTHORIZED)
    is_challenged(thief.check_in("digits"))
    assert decisions(running)["refused: token_taken"] == 1


def test_an_enrolled_answer_is_good_for_its_token_its_owner_and_its_population_only(server, enrol, devices):
    running = server("enrolment")
    device = enrol(running.api)
    proof = device.answer(device.check_in("digits"))
    thief = devices.enrolled(running.api, device.id, b"")
    thief.token = str(uuid.uuid4())
    is_turned_away(thief.check_in("digits", proof), 403, Rejection.UNAUTHORIZED)
    thief.token, thief.owner = device.token, "org.evil/org.evil.Worker-00"
    is_turned_away(thief.check_in("digits", proof), 403, Rejection.UNAUTHORIZED)
    is_turned_away(device.check_in("letters", proof), 403, Rejection.UNAUTHORIZED)
    assert device.check_in("digits", proof).status_code == 200


def test_a_token_that_another_owner_or_device_has_is_granted_to_nobody_else(server, enrol):
    running = server("enrolment")
    first, second = enrol(running.api), enrol(running.api, owner="org.other/org.other.Worker-00")
    first.check_in("digits", first.answer(first.check_in("digits")))
    challenge = info_of(second.check_in("digits")).auth_metadata.key_attestation_metadata.challenge
    second.token = first.token
    is_turned_away(second.check_in("digits", second.prove(challenge, first.token)), 403, Rejection.UNAUTHORIZED)
    assert decisions(running)["refused: token_taken"] == 1
    with database(running).read() as tx:
        (row,) = tx.execute(select(schema.authorization_token)).all()
    assert row.participant == first.id


def test_a_revoked_enrolment_is_refused_and_so_is_its_token(server, enrol, hand_made):
    running = server("enrolment")
    api = running.api
    open_task(running, hand_made)
    device, other = enrol(api), enrol(api)
    assignment = device.take_part("digits")
    other.take_part("digits")
    assert api.http.delete(f"{api.url}/api/v1/enrolments/{device.id}").status_code == 200
    is_challenged(device.report(assignment), ReportAnswer)
    is_challenged(challenged := device.check_in("digits"))
    is_turned_away(device.check_in("digits", device.answer(challenged)), 403, Rejection.UNAUTHORIZED)
    assert other.check_in("digits").status_code in (200, 201)
    assert api.http.delete(f"{api.url}/api/v1/enrolments/{device.id}").status_code == 404
    listed = api.http.get(f"{api.url}/api/v1/enrolments").json()["enrolments"]
    assert {one["id"]: one["revoked"] is not None for one in listed} == {device.id: True, other.id: False}
    assert not any("secret" in one for one in listed)


@KINDS
def test_a_report_needs_the_token_of_its_session(device_of, enrol, hand_made, maker, devices, kind):
    running, device = device_of(kind)
    open_task(running, hand_made, goal=3)
    assignment = device.take_part("digits")
    # Another device of the same app, with a live token of the same owner.
    other = enrol(running.api) if kind == "enrolment" else devices.attested(running.api, maker)
    other.take_part("digits")
    nobody = devices.enrolled(running.api, "nobody", bytes(32))
    for result in (Report.COMPLETED, Report.FAILED):
        is_challenged(other.report(assignment, result), ReportAnswer)
        is_challenged(nobody.report(assignment, result), ReportAnswer)
    assert device.report(assignment, Report.FAILED).status_code == 200
    is_unknown(device.report(assignment))


@KINDS
def test_a_session_takes_a_token_that_was_earned_in_the_same_report(device_of, hand_made, kind):
    running, device = device_of(kind)
    open_task(running, hand_made, goal=3)
    assignment = device.take_part("digits")
    device.token = None
    challenged = device.report(assignment)
    is_challenged(challenged, ReportAnswer)
    proof = device.answer(challenged, ReportAnswer)
    for _ in range(3):
        answer = device.report(assignment, proof=proof)
        assert answer.status_code == 200
        assert ReportAnswer.FromString(answer.content).upload_instruction.upload_location
    # It is the device's token from now on, for check-ins too.
    assert device.report(assignment).status_code == 200
    assert device.check_in("digits").status_code in (200, 201)


@KINDS
@pytest.mark.parametrize("cleaned", [False, True])
def test_a_token_that_expires_between_check_in_and_report_costs_one_more_dance(device_of, hand_made, kind, cleaned):
    running, device = device_of(kind)
    open_task(running, hand_made, goal=3)
    assignment = device.take_part("digits")
    age_tokens(running, seconds=1)
    if cleaned:
        with database(running).write() as tx:
            tx.execute(schema.authorization_token.delete())
    challenged = device.report(assignment)
    is_challenged(challenged, ReportAnswer)
    proof = device.answer(challenged, ReportAnswer)
    for _ in range(2):
        assert device.report(assignment, proof=proof).status_code == 200


def test_a_failure_report_counts_on_the_token_of_its_session_though_it_has_expired(device_of, hand_made):
    running, device = device_of("enrolment")
    task_id = open_task(running, hand_made, goal=3, room=6)
    with_token, without_token = device.take_part("digits"), device.take_part("digits")
    age_tokens(running, seconds=1)
    assert device.report(with_token, Report.FAILED).status_code == 200
    device.token = None
    assert device.report(without_token, Report.NOT_ELIGIBLE).status_code == 200
    counts = running.api.task("digits", task_id)["assignments"]
    assert (counts["LOCAL_FAILED"], counts["LOCAL_NOT_ELIGIBLE"]) == (1, 1)


def test_nobody_else_can_fail_a_session_whose_token_has_expired_with_a_token(device_of, enrol, hand_made):
    running, device = device_of("enrolment")
    open_task(running, hand_made)
    assignment = device.take_part("digits")
    age_tokens(running, seconds=1)
    other = enrol(running.api)
    other.take_part("digits")
    is_challenged(other.report(assignment, Report.FAILED), ReportAnswer)
    proof = other.answer(other.report(assignment), ReportAnswer)
    is_turned_away(other.report(assignment, proof=proof), 403, Rejection.UNAUTHORIZED, ReportAnswer)


def test_an_attested_phone_cannot_take_over_the_session_of_an_enrolled_device(server, enrol, hand_made, maker, devices):
    running = server("both")
    open_task(running, hand_made)
    assignment = enrol(running.api).take_part("digits")
    phone = devices.attested(running.api, maker)
    proof = phone.answer(phone.report(assignment), ReportAnswer)
    is_turned_away(phone.report(assignment, proof=proof), 403, Rejection.UNAUTHORIZED, ReportAnswer)


def test_a_challenge_of_one_session_proves_nothing_for_another_or_for_a_check_in(server, hand_made, maker, devices):
    running = server("attestation")
    open_task(running, hand_made)
    first, second = (devices.attested(running.api, maker) for _ in range(2))
    own, other = first.take_part("digits"), second.take_part("digits")
    proof = second.answer(second.report(own), ReportAnswer)
    is_turned_away(second.report(other, proof=proof), 403, Rejection.UNAUTHORIZED, ReportAnswer)
    is_turned_away(second.check_in("digits", proof), 403, Rejection.UNAUTHORIZED)


@KINDS
def test_a_forged_session_gets_nothing_with_any_token(device_of, hand_made, kind):
    running, device = device_of(kind)
    open_task(running, hand_made)
    assignment = device.take_part("digits")
    true_name = assignment.self_uri
    assignment.self_uri = f"{true_name.rpartition('/')[0]}/{uuid.uuid4()}"
    is_unknown(device.report(assignment))
    device.token = None
    challenged = device.report(assignment)
    is_challenged(challenged, ReportAnswer)
    proof = device.answer(challenged, ReportAnswer)
    is_unknown(device.report(assignment, proof=proof))
    # And the proof has earned no token on the way.
    is_challenged(device.check_in("digits"))


def test_a_session_from_before_devices_had_to_authenticate_can_still_report(run_server, hand_made, server, tmp_path):
    data = tmp_path / "shared"
    before = run_server(data_dir=data)
    open_task(before, hand_made)
    assignment = before.api.assignment("digits")
    before.stop()
    after = server("enrolment", data_dir=data)
    assert after.api.report(assignment).status_code == 200


def private(hand_made, separation=0):
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=2))
    process.privacy_claim.participation = learning_pb2.PrivacyClaim.Participation.NO_AMPLIFICATION
    process.privacy_claim.estimated_population = 100
    process.privacy_claim.delta = 1e-6
    process.privacy_claim.minimum_separation = separation
    return process


def test_an_enrolled_device_takes_part_once_in_a_round_with_noise_whatever_it_says(server, enrol, hand_made):
    running = server("enrolment")
    running.api.open_task("digits", private(hand_made), goal=2, rounds=2)
    greedy = enrol(running.api)
    assignment = greedy.take_part("digits")
    # With the same token, with a new one, and in the name of another app.
    again = greedy.check_in("digits")
    assert again.status_code == 200
    assert info_of(again).reason == Rejection.NO_TASK_AVAILABLE
    greedy.token = None
    renewed = greedy.check_in("digits", greedy.answer(greedy.check_in("digits")))
    assert info_of(renewed).reason == Rejection.NO_TASK_AVAILABLE
    greedy.owner, greedy.token = "org.evil/org.evil.Worker-00", None
    other_name = greedy.check_in("digits", greedy.answer(greedy.check_in("digits")))
    assert info_of(other_name).reason == Rejection.NO_TASK_AVAILABLE
    # A device that failed has contributed nothing, and may try again.
    greedy.owner, greedy.token = OWNER, None
    challenged = greedy.report(assignment, Report.FAILED)
    proof = greedy.answer(challenged, ReportAnswer)
    assert greedy.report(assignment, Report.FAILED, proof=proof).status_code == 200
    assert greedy.check_in("digits").status_code == 201


def test_without_noise_or_separation_an_enrolled_device_may_come_again(server, enrol, hand_made):
    running = server("enrolment")
    open_task(running, hand_made, goal=3)
    device = enrol(running.api)
    device.take_part("digits")
    assert device.check_in("digits").status_code == 201


@KINDS
def test_nothing_secret_is_stored_in_clear_or_logged(device_of, hand_made, caplog, kind):
    caplog.set_level(logging.DEBUG)
    running, device = device_of(kind)
    open_task(running, hand_made)
    seen = []
    challenged = device.check_in("digits")
    challenge = info_of(challenged).auth_metadata.key_attestation_metadata.challenge
    bad = device.answer(challenged).replace("A", "B")
    device.check_in("digits", bad)
    seen += [device.token, bad]
    assignment = device.take_part("digits")
    seen.append(device.token)
    device.report(assignment)
    device.token = None
    device.report(assignment)
    seen += [base64.b64encode(challenge).decode(), challenge.hex(), assignment.assignment_id]
    if kind == "enrolment":
        seen += [base64.b64encode(device.secret).decode(), device.secret.hex()]
    # What the client of the test logs is its own affair.
    records = [one for one in caplog.records if not one.name.startswith(("httpx", "httpcore"))]
    assert records
    for record in records:
        text = record.getMessage() + (record.exc_text or "")
        assert not any(one in text for one in seen), text
    with database(running).read() as tx:
        (row,) = tx.execute(select(schema.authorization_token)).all()
        enrolments = tx.execute(select(schema.enrolment)).all()
    assert row.token_hash == token_hash(seen[2])
    running.stop()
    stored = b"".join(one.read_bytes() for one in running.settings.data_dir.glob("fedcompute.db*"))
    for one in (seen[0], seen[2]):
        assert one.encode() not in stored
    if kind == "enrolment":
        assert enrolments[0].sealed_with
        assert device.secret not in stored


def test_challenges_beyond_the_rate_are_answered_with_a_window(server, enrol):
    running = server("enrolment", challenges_per_owner=0.1)
    device = enrol(running.api)
    is_challenged(device.check_in("digits", attempts=3))
    is_turned_away(device.check_in("digits", attempts=3), 200, Rejection.UNAUTHENTICATED)
    assert decisions(running) == {"challenged": 3, "challenged too often": 1}


def test_an_address_gets_no_more_challenges_by_naming_other_owners(server, enrol):
    running = server("enrolment", challenges_per_address=0.1)
    first, second = enrol(running.api), enrol(running.api, owner="org.other/org.other.Worker-00")
    is_challenged(first.check_in("digits", attempts=3))
    is_turned_away(second.check_in("digits", attempts=3), 200, Rejection.UNAUTHENTICATED)
    assert decisions(running)["challenged too often"] == 1


@KINDS
def test_challenges_and_tokens_outlive_a_restart(device_of, server, hand_made, tmp_path, kind):
    data = tmp_path / "kept"
    first, device = device_of(kind, data_dir=data)
    challenged = device.check_in("digits")
    first.stop()
    second = server(kind, data_dir=data)
    device.api = second.api
    assert device.check_in("digits", device.answer(challenged)).status_code == 200
    second.stop()
    third = server(kind, data_dir=data)
    device.api = third.api
    assert device.check_in("digits").status_code == 200
    assert decisions(third) == {"admitted": 1}


def test_tokens_of_a_kind_that_is_taken_no_more_are_challenged(server, enrol, tmp_path):
    data = tmp_path / "kept"
    first = server("both", data_dir=data)
    device = enrol(first.api)
    device.check_in("digits", device.answer(device.check_in("digits")))
    assert device.check_in("digits").status_code == 200
    first.stop()
    device.api = server("attestation", data_dir=data).api
    is_challenged(device.check_in("digits"))


def test_what_was_decided_can_be_read_and_failures_of_policy_are_told_apart(server, enrol, maker, devices):
    running = server("both")
    api = running.api
    assert api.http.get(f"{api.url}/api/v1/authentication").json() == {"devices": "both", "decisions": {}}
    device = enrol(api)
    device.secret = bytes(32)
    device.check_in("digits", device.answer(device.check_in("digits")))
    phone = devices.attested(api, maker)
    phone.claims = {"locked": False}
    phone.check_in("digits", phone.answer(phone.check_in("digits")))
    found = api.http.get(f"{api.url}/api/v1/authentication").json()["decisions"]
    assert found == {"challenged": 2, "refused: enrolment_refused": 1, "refused: attestation_device": 1}


def test_enrolling_and_revoking_are_in_the_audit_log_without_the_secret(server, enrol):
    api = server("enrolment").api
    device = enrol(api)
    api.http.delete(f"{api.url}/api/v1/enrolments/{device.id}")
    response = api.http.get(f"{api.url}/api/v1/audit")
    acts = [(one["action"], device.id in one["subject"]) for one in response.json()["acts"]]
    assert acts == [("enrolment.revoke", True), ("enrolment.create", True)]
    assert base64.b64encode(device.secret).decode() not in response.text


@pytest.mark.parametrize(
    "document", [{}, {"label": 1}, {"label": ""}, {"label": "x", "count": 0}, {"label": "x", "count": True}]
)
def test_an_enrolment_that_cannot_be_made_is_a_typed_refusal(server, document):
    api = server("enrolment").api
    response = api.http.post(f"{api.url}/api/v1/enrolments", json=document)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_request")


def test_expired_tokens_are_cleaned_by_the_engine_after_a_day(server, enrol):
    running = server("enrolment")
    device = enrol(running.api)
    device.check_in("digits", device.answer(device.check_in("digits")))
    passes = Passes(running.app.state.context)
    for ago, left in ((timedelta(hours=23), 1), (timedelta(hours=25), 0)):
        age_tokens(running, seconds=ago.total_seconds())
        passes._clean()
        with database(running).read() as tx:
            assert len(tx.execute(select(schema.authorization_token)).all()) == left


def test_a_token_that_cannot_be_stored_is_not_admitted_and_the_same_proof_is_good_later(
    server, enrol, monkeypatch, tmp_path
):
    monkeypatch.setattr(authentication, "_WRITE_S", 0.5)
    running = server("enrolment")
    device = enrol(running.api)
    proof = device.answer(device.check_in("digits"))
    with contextlib.closing(sqlite3.connect(running.settings.data_dir / "fedcompute.db")) as busy:
        busy.execute("BEGIN IMMEDIATE")
        turned_away = device.check_in("digits", proof)
        assert turned_away.status_code == 200
        assert info_of(turned_away).reason == Rejection.NO_TASK_AVAILABLE
        is_challenged(device.check_in("digits"))
        busy.rollback()
    assert info_of(device.check_in("digits", proof)).reason == Rejection.NO_ACTIVE_TASK_EXISTS
    assert device.check_in("digits").status_code == 200


def test_two_servers_of_one_database_know_each_others_challenges_and_tokens(server, enrol, postgresql_url, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s" * 40)
    secret.chmod(0o600)
    shared = {"database_url": postgresql_url, "secret_file": secret, "blob_url": (tmp_path / "blobs").as_uri()}
    first, second = (server("enrolment", data_dir=tmp_path / name, **shared) for name in ("first", "second"))
    device = enrol(first.api)
    challenged = device.check_in("digits")
    device.api = second.api
    assert device.check_in("digits", device.answer(challenged)).status_code == 200
    device.api = first.api
    assert device.check_in("digits").status_code == 200
    assert first.api.http.delete(f"{first.api.url}/api/v1/enrolments/{device.id}").status_code == 200
    device.api = second.api
    is_challenged(device.check_in("digits"))


def test_a_server_that_takes_every_device_says_so_where_strangers_can_reach_it(hand_made, tmp_path, caplog):
    for host, said in (("127.0.0.1", False), ("0.0.0.0", True)):
        settings = hand_made.settings_of(tmp_path, host=host)
        assert authentication.open_authentication(settings, None, None, b"") is None
        assert ("every device" in caplog.text) is said


def test_the_same_idempotency_key_with_another_token_is_another_check_in(server, enrol, hand_made, devices):
    running = server("enrolment")
    open_task(running, hand_made)
    found = []
    for device in (enrol(running.api), enrol(running.api)):
        device.take_part("digits")
        named = {"odp-idempotency-key": "1 - same", "fcp-owner-id-digest": OWNER, **device.headers()}
        answers = [running.api.check_in("digits", headers=named) for _ in range(2)]
        found.append({devices.assignment_in(answer).assignment_id for answer in answers})
    assert [len(one) for one in found] == [1, 1]
    assert found[0] != found[1]
