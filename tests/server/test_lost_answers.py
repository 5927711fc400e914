"""Uploads that the store took although it did not say so."""

import asyncio

import numpy as np
import pytest

from fedcompute.errors import OperationFailed, Reason


@pytest.fixture
def server(run_server, hand_made):
    """A server with an open task whose round takes one update."""
    running = run_server()
    running.task_id = running.api.open_task("lost", hand_made.process_of(), goal=1, room=2)
    return running


@pytest.fixture
def upload(server, hand_made):
    """Uploads as a device does; returns the answer."""
    update = hand_made.update_of(hand_made.process_of(), [np.full(leaf.shape, 0.01) for leaf in hand_made.initial])
    body = server.api.seal(update)

    def one():
        instruction = server.api.upload_instruction(server.api.assignment("lost"))
        return server.api.upload(instruction, body)

    return one


def losing(monkeypatch, context, stores, afterwards):
    put = context.blobs.put_stream

    async def put_stream(bucket, path, chunks, limit):
        if stores:
            await put(bucket, path, chunks, limit)
        await afterwards(path)
        raise OperationFailed(Reason.STORAGE_FAILED, "no answer came")

    monkeypatch.setattr(context.blobs, "put_stream", put_stream)


def test_an_upload_that_was_found_and_used_before_the_store_failed_to_answer_is_taken(server, upload, monkeypatch):
    async def found(path):
        folder, session_id, _ = path.rsplit("/", 2)
        server.app.state.context.uploads.add(session_id, folder)
        server.app.state.context.wake()
        await asyncio.to_thread(server.api.wait_for, "lost", server.task_id, "COMPLETED", iteration=1)

    losing(monkeypatch, server.app.state.context, stores=True, afterwards=found)
    assert upload().status_code == 200


@pytest.mark.parametrize("stores", [False, True])
def test_a_device_hears_of_an_upload_that_nobody_has_used_yet(server, upload, monkeypatch, stores):
    async def nothing(path):
        pass

    losing(monkeypatch, server.app.state.context, stores, nothing)
    answer = upload()
    assert (answer.status_code, answer.json()["code"]) == (500, Reason.STORAGE_FAILED.value)
