"""Phones as spec/device.md describes them, byte by byte, against servers that take only devices they know."""

import itertools

import numpy as np
import pytest

from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2, task_pb2
from fedcompute.server.settings import RetryWindow
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

Rejection = federatedcompute_pb2.RejectionReason
Answer = task_assignments_pb2.CreateTaskAssignmentResponse


@pytest.fixture
def start(run_server, roots_file, devices):
    def run(**changes):
        return run_server(
            authentication="both",
            attestation_roots=roots_file,
            attestation_packages=(f"{devices.package}={devices.digest}",),
            **changes,
        ).api

    return run


@pytest.fixture
def make_phone(reference, hand_made, devices, maker):
    """Phones that attest, each an owner of its own: two runs of one would be barred by minimum separation."""
    numbers = itertools.count()

    def make(api, process, answer=None, **options):
        def compute(plan, checkpoint):
            told = read_checkpoint(checkpoint)
            weights = [told[name] for name in sorted(told) if "/trainable/" in name] or hand_made.initial
            return write_checkpoint(hand_made.update_of(process, [np.full_like(one, -0.25) for one in weights]))

        def attest(challenge, token):
            # The client escapes slashes by itself.
            return devices.header_of(maker.attest(challenge)).replace("\\/", "/")

        owner = f"org.example.app/org.example.app.Service{next(numbers)}"
        return reference.ReferenceClient(api.url, compute, owner=owner, answer=answer or attest, **options)

    return make


def statuses(phone, call):
    return [one.status for one in phone.sent if one.url.endswith(call)]


@pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "plain"])
def test_attesting_phones_train_and_evaluate(start, make_phone, hand_made, encrypt):
    api = start(allow_plaintext_uploads=not encrypt)
    training = hand_made.process_of()
    trained = api.open_task("phones", training, goal=2, rounds=2)
    phones = [make_phone(api, training, encrypt=encrypt) for _ in range(2)]

    def finished(task_id):
        for phone in phones:
            phone.run("phones")
        return api.task("phones", task_id)["task"]["status"] == "COMPLETED"

    api.wait(lambda: finished(trained), 90)
    for phone in phones:
        # Three attempts meet three challenges, then the proof is taken; never again for the life of the token.
        assert statuses(phone, ":create-task-assignment")[:4] == [401, 401, 401, 201]
        assert 401 not in statuses(phone, ":create-task-assignment")[4:]
        assert set(statuses(phone, ":report-result")) == {200}
    evaluation = hand_made.evaluation_of(training, ["sparse_categorical_accuracy"])
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = "phones"
    info.evaluation_info.training_task_id = trained
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    evaluated = api.open_task("phones", evaluation, goal=2, info=info)
    phones = [make_phone(api, evaluation, encrypt=encrypt) for _ in range(2)]
    api.wait(lambda: finished(evaluated) or api.task("phones", evaluated)["metrics"], 90)
    assert api.task("phones", evaluated)["rejections"] == {}


def test_a_phone_that_cannot_attest_is_sent_away_and_counts_the_failure(start, make_phone, hand_made):
    api = start(retry_unauthorized=RetryWindow(5.0, 6.0))
    api.open_task("phones", hand_made.process_of())
    phone = make_phone(api, hand_made.process_of(), answer=lambda challenge, token: "[]")
    run = phone.run("phones")
    assert not run.succeeded
    assert run.counted
    assert run.window_ms == (5000, 6000)
    assert statuses(phone, ":create-task-assignment") == [401] * 3 + [403] * 3


def test_a_phone_whose_token_the_server_forgot_during_the_run_proves_itself_again(start, make_phone, hand_made):
    api = start()
    process = hand_made.process_of()
    api.open_task("phones", process, goal=1)
    phone = make_phone(api, process)
    train = phone.compute

    def forget(plan, checkpoint):
        # The token is gone from the phone's own database while it trains.
        phone.tokens.clear()
        return train(plan, checkpoint)

    phone.compute = forget
    assert phone.run("phones").succeeded
    assert statuses(phone, ":report-result") == [401, 401, 401, 200]


@pytest.mark.parametrize("lost", [":create-task-assignment", ":report-result"])
def test_answers_that_get_lost_after_a_proof_change_nothing(start, make_phone, hand_made, lost):
    api = start()
    process = hand_made.process_of()
    task_id = api.open_task("phones", process, goal=1)
    phone = make_phone(api, process, lose=lambda method, url, attempt: url.endswith(lost) and attempt < 2)
    assert phone.run("phones").succeeded, phone.sent
    counts = api.wait_for("phones", task_id, "COMPLETED")["assignments"]
    assert counts == {"UPLOAD_COMPLETED": 1}
