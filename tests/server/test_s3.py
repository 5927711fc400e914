"""Whole rounds with every object on an S3 server, through our own URLs and through the store's."""

import asyncio
from datetime import timedelta

import httpx
import numpy as np
import pytest

from fedcompute.app import create_app
from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.context import now
from fedcompute.server.retention import Retention
from fedcompute.server.settings import Settings
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

TRAINABLE = "server/global_model_weights/trainable"


@pytest.fixture
def start(run_server, s3):
    def run(**settings):
        return run_server(blob_url=f"s3://{s3.bucket()}/fedcompute", retention_period=0.0, **settings)

    return run


def two_rounds(server, hand_made):
    process = hand_made.process_of()
    task_id = server.api.open_task("s3", process, goal=3, rounds=2)
    for number in (1, 2):
        for scale in range(3):
            deltas = [np.full(leaf.shape, float(scale)) for leaf in hand_made.initial]
            server.api.contribute("s3", hand_made.update_of(process, deltas))
        found = server.api.wait_for("s3", task_id, "COMPLETED", iteration=number)
    state = server.api.checkpoint("s3", task_id, 2)
    np.testing.assert_allclose(state[f"{TRAINABLE}/0"], hand_made.initial[0] - 2 * hand_made.rate, atol=1e-6)
    assert found["rejections"] == {}
    return task_id


def test_two_rounds_run_on_s3(start, hand_made):
    server = start(collector_batch_size=2)
    two_rounds(server, hand_made)
    assert not (server.settings.data_dir / "blobs").exists()


def test_with_urls_of_the_store_devices_fetch_and_upload_there(start, hand_made, s3):
    server = start(blob_urls="store", upload_timeout=1.0)
    task_id = server.api.open_task("direct", hand_made.process_of(), goal=1)
    assignment = server.api.assignment("direct")
    instruction = server.api.upload_instruction(assignment)
    for url in (assignment.plan.uri, assignment.init_checkpoint.uri, instruction.upload_location):
        assert url.startswith(f"{s3.url}/")
    for resource in (assignment.plan, assignment.init_checkpoint):
        with httpx.stream("GET", resource.uri) as response:
            raw = b"".join(response.iter_raw())
        assert (response.headers["content-encoding"], raw[:2]) == ("gzip", b"\x1f\x8b")
    assert dict(instruction.extra_request_headers) == {
        "content-type": "application/octet-stream",
        "content-encoding": "gzip",
    }
    process = hand_made.process_of()
    body = server.api.seal(hand_made.update_of(process, [np.zeros(leaf.shape) for leaf in hand_made.initial]))
    assert server.api.upload(instruction, body).status_code == 200
    # Nobody tells the server; it finds the object.
    server.api.wait_for("direct", task_id, "COMPLETED")
    two_rounds(server, hand_made)


def test_phones_train_with_urls_of_the_store(start, hand_made, reference):
    server = start(blob_urls="store", upload_timeout=4.0)
    process = hand_made.process_of()
    task_id = server.api.open_task("phones", process, goal=2, rounds=2, room=2)

    def compute(plan, checkpoint):
        assert plan.tflite_graph
        assert read_checkpoint(checkpoint)
        return write_checkpoint(hand_made.update_of(process, [np.ones(leaf.shape) for leaf in hand_made.initial]))

    for _ in range(4):
        server.api.wait(lambda: reference.ReferenceClient(server.api.url, compute).run("phones").succeeded)
    assert server.api.wait_for("phones", task_id, "COMPLETED")["rejections"] == {}


def test_many_uploads_that_nobody_announced_are_found(start, hand_made):
    server = start(blob_urls="store", upload_timeout=20.0)
    process = hand_made.process_of()
    task_id = server.api.open_task("many", process, goal=60, room=60)
    body = server.api.seal(hand_made.update_of(process, [np.zeros(leaf.shape) for leaf in hand_made.initial]))
    instructions = [server.api.upload_instruction(server.api.assignment("many")) for _ in range(60)]
    for one in instructions:
        assert server.api.upload(one, body).status_code == 200
    assert server.api.wait_for("many", task_id, "COMPLETED")["assignments"] == {"UPLOAD_COMPLETED": 60}


def test_an_artifact_is_put_through_the_server_whatever_the_urls_of_devices_are(start, hand_made):
    server = start(blob_urls="store")
    task = server.api.create_task("artifacts")
    assert task.server_phase_url[0].startswith(server.api.url)


def test_retention_removes_from_s3_too(start, hand_made):
    server = start()
    two_rounds(server, hand_made)
    context = server.app.state.context
    assert context.blobs.list("gradient", "")
    removed = Retention(context.database, context.blobs, context.settings).look(now() + timedelta(days=2))
    assert removed.objects == 8
    assert context.blobs.list("gradient", "") == context.blobs.list("aggregated", "") == []
    assert context.blobs.list("model", "")


def test_a_round_survives_a_store_that_fails_for_a_while(start, hand_made, s3):
    server = start()
    process = hand_made.process_of()
    task_id = server.api.open_task("stumbling", process, goal=2)
    for _ in range(2):
        deltas = [np.zeros(leaf.shape) for leaf in hand_made.initial]
        update = hand_made.update_of(process, deltas)
        s3.outages = 3
        server.api.contribute("stumbling", update)
    assert server.api.wait_for("stumbling", task_id, "COMPLETED")["rejections"] == {}


@pytest.mark.parametrize("fault", ["failure_rate", "loss_rate"])
def test_rounds_come_out_right_where_every_fifth_request_fails_or_its_answer_is_lost(start, hand_made, s3, fault):
    server = start(collector_batch_size=2)
    setattr(s3, fault, 0.2)
    two_rounds(server, hand_made)


@pytest.fixture
def start_once():
    """Starts an application and stops it; raises what kept it from starting."""

    async def run(settings):
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            pass

    return lambda settings: asyncio.run(run(settings))


def test_a_server_refuses_to_start_on_a_store_that_overwrites(s3, tmp_path, start_once):
    s3.ignores_conditions = True
    with pytest.raises(OperationFailed) as caught:
        start_once(Settings(data_dir=tmp_path, blob_url=f"s3://{s3.bucket()}", workers=1))
    assert caught.value.reason is Reason.BLOB_STORE_UNSUITABLE


def test_a_server_refuses_store_urls_where_the_store_has_none(tmp_path, start_once):
    with pytest.raises(OperationFailed) as caught:
        start_once(Settings(data_dir=tmp_path, blob_urls="store", workers=1))
    assert caught.value.reason is Reason.SETTINGS_INVALID
