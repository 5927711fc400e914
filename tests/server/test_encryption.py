"""What may be encrypted and what must be: uploads of devices, and sums on their way (spec/server.md 7)."""

import gzip
import json
import os

import numpy as np
import pytest

from fedcompute.crypto.keys import PublicKey, generate_key_pair
from fedcompute.storage.batches import list_batches
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.schema import BatchStatus
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.partial_sum import decode


def ones(hand_made):
    return [np.ones_like(value) for value in hand_made.initial]


def sums(running):
    found = (running.settings.data_dir / "blobs" / "aggregated").rglob("gradient")
    return sorted(path for path in found if path.is_file())


def plaintexts(hand_made, process):
    """Bodies without encryption: everything that a device without it, or somebody else, could send."""
    checkpoint = write_checkpoint(hand_made.update_of(process, ones(hand_made)))
    return {
        "an update without encryption": gzip.compress(checkpoint),
        "an update without the outer gzip": checkpoint,
        "random bytes": os.urandom(5000),
        "one byte": b"x",
        "text": b"[1, 2, 3]",
        "a JSON text that is no object": gzip.compress(b'"text"'),
        "half an object": gzip.compress(b'{"keyId": '),
    }


def test_the_store_takes_any_upload_of_legal_size_and_plaintext_costs_its_own_contribution(run_server, hand_made):
    running = run_server(max_upload_bytes=100_000)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("refused", process, goal=2, room=30)
    bodies = plaintexts(hand_made, process)
    for body in bodies.values():
        # `contribute` asserts that the store answered 200.
        api.contribute("refused", body=body)
    _, instruction = api.place("refused")
    assert api.upload(instruction, bytes(100_001)).status_code == 413
    for _ in range(2):
        api.contribute("refused", hand_made.update_of(process, ones(hand_made)))
    found = api.wait_for("refused", task_id, "COMPLETED")
    assert found["rejections"] == {"upload_not_encrypted": len(bodies)}
    assert found["assignments"]["REMOTE_FAILED"] == len(bodies)
    weights = api.checkpoint("refused", task_id, 1)["server/global_model_weights/trainable/0"]
    np.testing.assert_allclose(weights, hand_made.initial[0] - hand_made.rate, atol=1e-6)


def test_an_operator_may_count_plaintext_and_encrypted_updates_count_beside_it(run_server, hand_made):
    running = run_server(allow_plaintext_uploads=True)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("mixed", process, goal=3)
    leaves = hand_made.update_of(process, ones(hand_made))
    for body in (gzip.compress(write_checkpoint(leaves)), write_checkpoint(leaves), api.seal(leaves)):
        api.contribute("mixed", body=body)
    assert api.wait_for("mixed", task_id, "COMPLETED")["rejections"] == {}


def test_sums_are_encrypted_where_the_operator_says_so_and_give_the_same_model(run_server, hand_made, tmp_path):
    released = {}
    for encrypted in (False, True):
        running = run_server(data_dir=tmp_path / str(encrypted), encrypt_aggregates=encrypted, collector_batch_size=2)
        api, process = running.api, hand_made.process_of()
        task_id = api.open_task("sums", process, goal=4)
        for scale in range(4):
            deltas = [value * scale for value in ones(hand_made)]
            api.contribute("sums", hand_made.update_of(process, deltas))
        api.wait_for("sums", task_id, "COMPLETED")
        released[encrypted] = api.checkpoint("sums", task_id, 1)
        stored = [gzip.decompress(path.read_bytes()) for path in sums(running)]
        assert len(stored) == 2
        for one in stored:
            if encrypted:
                wrapper = json.loads(one)
                assert wrapper["associatedData"] == ""
                key_ids = {
                    key["id"] for key in api.http.get(f"{api.url}/api/v1/encryption-keys").json()["encryption_keys"]
                }
                assert wrapper["keyId"] in key_ids
            else:
                assert decode(one).num_inputs == 2
    assert released[True].keys() == released[False].keys()
    for name, value in released[False].items():
        np.testing.assert_array_equal(released[True][name], value)


@pytest.mark.parametrize("first", [False, True])
def test_sums_made_before_the_switch_still_open_after_it(run_server, hand_made, first):
    running = run_server(encrypt_aggregates=first, collector_batch_size=1)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("switch", process, goal=2)
    api.contribute("switch", hand_made.update_of(process, ones(hand_made)))
    context, key = running.app.state.context, IterationKey("switch", task_id, 1)

    def finished():
        with context.database.read() as tx:
            return list_batches(tx, key, statuses=[BatchStatus.UPLOAD_COMPLETED])

    api.wait(finished)
    (old,) = sums(running)
    running.stop()
    running.stop = lambda: None
    again = run_server(encrypt_aggregates=not first, collector_batch_size=1)
    again.api.contribute("switch", hand_made.update_of(process, ones(hand_made)))
    assert again.api.wait_for("switch", task_id, "COMPLETED")["rejections"] == {}
    forms = {path: gzip.decompress(path.read_bytes()).startswith(b"{") for path in sums(again)}
    assert len(forms) == 2
    assert forms.pop(old) is first
    assert list(forms.values()) == [not first]


def test_a_key_of_another_list_neither_opens_nor_counts(run_server, hand_made):
    from datetime import UTC, datetime, timedelta

    from fedcompute.crypto.envelope import gzip_bytes, seal_update

    running = run_server()
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("foreign", process, goal=1, room=9)
    data = write_checkpoint(hand_made.update_of(process, ones(hand_made)))
    theirs = generate_key_pair(datetime.now(UTC), timedelta(days=1))
    ours = api.http.get(f"{api.url}/.well-known/odp/v1/public-keys").json()["keys"][0]["id"]
    api.contribute("foreign", body=gzip_bytes(seal_update(data, theirs.published)))
    api.contribute("foreign", body=gzip_bytes(seal_update(data, PublicKey(ours, theirs.public_key))))
    api.contribute("foreign", hand_made.update_of(process, ones(hand_made)))
    found = api.wait_for("foreign", task_id, "COMPLETED")
    assert found["rejections"] == {"unknown_key": 1, "decryption_failed": 1}
