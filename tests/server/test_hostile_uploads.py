"""Uploads that mean harm: each costs its sender one contribution, and nobody else anything."""

import base64
import functools
import gzip
import json
import re
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from fedcompute.crypto.keys import parse_public_keys
from fedcompute.protos import learning_pb2, task_assignments_pb2
from fedcompute.tensors.checkpoint import write_checkpoint

Report = task_assignments_pb2.ReportResultRequest
MIB = 1 << 20
_BOMB = 512 * MIB


@functools.cache
def zeros(size):
    """`size` zero bytes as gzip, about a thousandth of it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


class Hostile:
    """Makes bodies for one server and one process; every name is a kind of harm, its reason what the server says."""

    def __init__(self, api, reference, hand_made, process) -> None:
        self.key = parse_public_keys(api.http.get(f"{api.url}/.well-known/odp/v1/public-keys").content)[0]
        self.hpke_seal, self.process, self.hand_made = reference.hpke_seal, process, hand_made

    def envelope(self, plaintext: bytes, **changes) -> bytes:
        """gzip(JSON(HPKE(plaintext))): the inner gzip is the caller's."""
        fields = {
            "keyId": self.key.id,
            "encryptedPayload": base64.b64encode(self.hpke_seal(self.key.key, plaintext, b"{}")).decode(),
            "associatedData": "e30=",
        }
        return gzip.compress(json.dumps({**fields, **changes}).encode())

    def file(self, data: bytes) -> bytes:
        return self.envelope(gzip.compress(data))

    def leaves(self, *, value=None, more=None) -> bytes:
        """An update whose first weight leaf is `value`, with `more` leaves."""
        value = np.zeros((3, 2), np.float32) if value is None else value
        return self.file(write_checkpoint({**self.update(value), **(more or {})}))

    def bodies(self) -> dict[str, tuple[bytes, str]]:
        good = self.leaves()
        plain = gzip.decompress(good)
        file = write_checkpoint(self.hand_made.update_of(self.process, self.hand_made.initial))
        weight = np.zeros((3, 2), np.float32)
        payload = json.loads(plain)["encryptedPayload"]
        flipped = base64.b64encode(bytes([*base64.b64decode(payload)[:-1], 0])).decode()

        def filled(value):
            return self.leaves(value=np.full_like(weight, value))

        return {
            "no gzip, no JSON": (b"hello", "upload_not_encrypted"),
            "plain checkpoint": (gzip.compress(file), "upload_not_encrypted"),
            "plain checkpoint without gzip": (file, "upload_not_encrypted"),
            "gzip of gzip of gzip": (gzip.compress(gzip.compress(gzip.compress(file))), "upload_not_encrypted"),
            "truncated gzip": (good[:-20], "upload_truncated"),
            "gzip with a tail": (good + b"tail", "upload_truncated"),
            "two gzip members": (good + good, "upload_truncated"),
            "wrong checksum": (good[:-8] + bytes(4) + good[-4:], "upload_truncated"),
            "gzip header only": (b"\x1f\x8b\x08\x00" + bytes(6), "upload_truncated"),
            "gzip with reserved flags": (good[:3] + b"\xe0" + good[4:], "upload_truncated"),
            "outer bomb": (zeros(_BOMB), "upload_too_large"),
            "outer bomb in an envelope": (gzip.compress(b'{"keyId": "' + b" " * 64 * MIB), "upload_too_large"),
            "inner bomb": (self.envelope(zeros(_BOMB)), "upload_too_large"),
            "inner bomb of bombs": (self.envelope(gzip.compress(zeros(16 * MIB))), "checkpoint_malformed"),
            "inner is no gzip": (self.envelope(file), "upload_truncated"),
            "empty inner": (self.envelope(b""), "upload_truncated"),
            "empty file": (self.file(b""), "checkpoint_malformed"),
            "JSON that does not end": (gzip.compress(plain[:-3]), "upload_not_encrypted"),
            "deep JSON": (gzip.compress(b'{"a":' * 5000), "decryption_failed"),
            "wide JSON": (gzip.compress(b'{"a":[' + b"[]," * 30_000 + b"[]]}"), "decryption_failed"),
            "JSON of many members": (gzip.compress(b"{" + b'"":"",' * 20_000 + b'"":""}'), "decryption_failed"),
            "JSON with a huge number": (gzip.compress(b'{"keyId":' + b"9" * 90_000 + b"}"), "upload_not_encrypted"),
            "JSON list": (gzip.compress(b"[" + plain + b"]"), "upload_not_encrypted"),
            "JSON with a lone surrogate": (self.envelope(b"", keyId="\ud800"), "unknown_key"),
            "no members": (gzip.compress(b"{}"), "decryption_failed"),
            "members of other types": (self.envelope(b"", keyId=7), "decryption_failed"),
            "no base64": (self.envelope(b"", encryptedPayload="!" * 100), "decryption_failed"),
            "short payload": (self.envelope(b"", encryptedPayload="AAAA"), "decryption_failed"),
            "zero point": (self.envelope(b"", encryptedPayload="A" * 88), "decryption_failed"),
            "flipped tag": (self.envelope(b"", encryptedPayload=flipped), "decryption_failed"),
            "other info": (self.envelope(gzip.compress(file), associatedData=""), "decryption_failed"),
            "unknown key": (self.envelope(b"", keyId="nobody"), "unknown_key"),
            "key with a path": (self.envelope(b"", keyId="../../keys/1"), "unknown_key"),
            "key of 10 KB": (self.envelope(b"", keyId="k" * 10_000), "unknown_key"),
            "random file": (self.file(bytes(range(256)) * 4), "checkpoint_malformed"),
            "half a file": (self.file(file[: len(file) // 2]), "checkpoint_malformed"),
            "NaN": (filled(np.nan), "not_finite"),
            "Infinity": (filled(-np.inf), "not_finite"),
            "other leaves": (self.file(write_checkpoint({"x": weight})), "wrong_leaf_names"),
            "a leaf more": (self.leaves(more={"extra": weight}), "wrong_leaf_names"),
            "another shape": (self.leaves(value=weight.T.copy()), "wrong_leaf_shape"),
            "a huge shape": (self.leaves(value=np.zeros((0, 2), np.float32)), "wrong_leaf_shape"),
            "another type": (self.leaves(value=weight.astype(np.float64)), "wrong_leaf_type"),
            "integers": (self.leaves(value=weight.astype(np.int64) + 2**62), "wrong_leaf_type"),
            "strings": (self.leaves(value=np.full((3, 2), b"x" * 100, object)), "wrong_leaf_type"),
            "a leaf twice": (self.file(twice(self.update(weight), values=True)), "checkpoint_malformed"),
            "a leaf listed twice": (self.file(twice(self.update(weight), values=False)), "checkpoint_malformed"),
        }  # fmt: skip

    def only_clipped(self) -> dict[str, tuple[bytes, str]]:
        """What an aggregator that bounds every contribution refuses."""
        huge = np.full((3, 2), 3e38, np.float32)
        return {
            "larger than any clip norm": (self.leaves(value=huge), "norm_too_large"),
            "a little larger than the clip norm": (self.leaves(value=np.full_like(huge, 4.09)), "norm_too_large"),
        }

    def only_counted(self) -> dict[str, tuple[bytes, str]]:
        """What an aggregator that counts contributions refuses."""
        return {f"a count of {count}": (self.counted(count), "wrong_count") for count in (0, -1, 10**6, 2**31 - 1)}

    def update(self, first) -> dict[str, np.ndarray]:
        zeros_ = [np.zeros(weight.shape, np.float32) for weight in self.hand_made.initial]
        update = self.hand_made.update_of(self.process, zeros_)
        return {name: first if value.shape == (3, 2) else value for name, value in update.items()}

    def counted(self, count) -> bytes:
        update = self.update(np.zeros((3, 2), np.float32))
        count = np.array(count, np.int32)
        return self.file(write_checkpoint({n: count if v.dtype == np.int32 else v for n, v in update.items()}))


def twice(leaves, *, values) -> bytes:
    """A file that lists its first leaf twice and, with `values`, stores it twice."""
    from fedcompute.tensors import checkpoint
    from fedcompute.tensors.table import write_table
    from fedcompute.tensors.wire import chunk, integer

    arrays = [(checkpoint._leaf(name, leaves[name]), leaves[name]) for name in sorted(leaves)]
    listed = [arrays[0], *arrays]
    meta = b"".join(chunk(1, checkpoint._listing(leaf)) for leaf, _ in listed) + chunk(2, integer(1, 1))
    stored = listed if values else arrays
    entries = [(checkpoint._key(leaf), checkpoint._value(leaf, value)) for leaf, value in stored]
    return write_table([(b"", [chunk(1, meta)]), *entries])


CLIPPED = learning_pb2.FixedGaussian(clip_norm=10.0, noise_multiplier=0.0, report_goal=2)


def wait_for_rejections(api, population, task_id, number):
    """The task's rejections by reason, once there are so many."""
    return api.wait(
        lambda: sum((found := api.task(population, task_id)["rejections"]).values()) >= number and found, seconds=90
    )


@pytest.mark.parametrize("aggregator", [CLIPPED, None], ids=["clipped", "counted"])
def test_every_hostile_upload_is_refused_by_its_reason_and_the_round_ends_with_the_honest(
    run_server, reference, hand_made, aggregator
):
    api = run_server().api
    process = hand_made.process_of(aggregator)
    hostile = Hostile(api, reference, hand_made, process)
    bodies = {**hostile.bodies(), **(hostile.only_clipped() if aggregator else hostile.only_counted())}
    goal = 10
    task_id = api.open_task("hostile", process, goal=goal, room=2 * len(bodies))
    expected = {}
    for body, reason in bodies.values():
        expected[reason] = expected.get(reason, 0) + 1
        api.contribute("hostile", body=body)
    for _ in range(-len(bodies) % goal):
        expected["upload_not_encrypted"] += 1
        api.contribute("hostile", body=b"one more, for a whole batch")
    assert wait_for_rejections(api, "hostile", task_id, sum(expected.values())) == expected
    api.wait_for("hostile", task_id, "COLLECTING", iteration=1)
    honest = [np.full(weight.shape, 0.5, np.float32) for weight in hand_made.initial]
    for _ in range(goal):
        api.contribute("hostile", hand_made.update_of(process, honest))
    found = api.wait_for("hostile", task_id, "COMPLETED")
    # Who came while a batch was judged was told to come again.
    counts = {name: number for name, number in found["assignments"].items() if name != "CANCELED"}
    assert counts == {"UPLOAD_COMPLETED": goal, "REMOTE_FAILED": sum(expected.values())}
    released = api.checkpoint("hostile", task_id, 1)
    assert all(np.isfinite(value).all() for value in released.values() if value.dtype == np.float32)


def test_extreme_numbers_of_honest_form_neither_overflow_nor_poison_a_clipped_sum(run_server, reference, hand_made):
    api = run_server().api
    process = hand_made.process_of(CLIPPED)
    hostile = Hostile(api, reference, hand_made, process)
    task_id = api.open_task("extreme", process, goal=2, room=9)
    weight = np.zeros((3, 2), np.float32)
    tiny = np.full_like(weight, np.finfo(np.float32).smallest_subnormal)
    edge = np.full_like(weight, 10 / np.sqrt(6), np.float32)
    for value in (tiny, -edge):
        api.contribute("extreme", body=hostile.leaves(value=value))
    api.wait_for("extreme", task_id, "COMPLETED")
    before, after = (api.checkpoint("extreme", task_id, number) for number in (0, 1))
    moved = [after[name] - before[name] for name in before if before[name].shape == (3, 2)]
    assert 0 < max(np.abs(one).max() for one in moved) <= 10


def test_replaying_somebody_elses_upload_counts_it_for_its_sender_only_once(run_server, reference, hand_made):
    """Bytes that another device sent open with the server's key; but a session counts once, whatever it holds."""
    running = run_server()
    api = running.api
    process = hand_made.process_of()
    task_id = api.open_task("replayed", process, goal=2, room=3)
    body = api.seal(hand_made.update_of(process, hand_made.initial))
    instruction = api.upload_instruction(api.assignment("replayed"))
    for _ in range(4):
        assert api.upload(instruction, body).status_code == 200
    api.wait(lambda: api.task("replayed", task_id)["assignments"] == {"UPLOAD_COMPLETED": 1})
    for _ in range(4):
        assert api.upload(instruction, body).status_code == 200
    time.sleep(0.5)
    assert api.task("replayed", task_id)["iterations"][0]["status"] == "COLLECTING"
    api.contribute("replayed", body=body)
    found = api.wait_for("replayed", task_id, "COMPLETED")
    assert found["assignments"] == {"UPLOAD_COMPLETED": 2}
    assert api.upload(instruction, b"too late").status_code == 200
    stored = [path for path in (running.settings.data_dir / "blobs" / "gradient").rglob("gradient") if path.is_file()]
    assert all(path.read_bytes() == body for path in stored)


# Memory


def workers():
    """The server's worker processes: what this process has started, and what those have."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    import os

    found, edge = set(), {os.getpid()}
    while edge:
        edge = {child for child, parent in parents.items() if parent in edge}
        found |= edge
    return found


def memory(process, field):
    """VmRSS or VmHWM of a process in MiB; 0 of one that is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+)", text)
    return int(found[1]) // 1024 if found else 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_bombs_leave_the_memory_of_the_workers_flat(run_server, reference, hand_made):
    api = run_server().api
    process = hand_made.process_of()
    hostile = Hostile(api, reference, hand_made, process)
    task_id = api.open_task("bombs", process, goal=1, rounds=2, room=1)
    # One round of honest work: what the workers need for that is what they may need.
    api.contribute("bombs", hand_made.update_of(process, hand_made.initial))
    api.wait_for("bombs", task_id, "COLLECTING", iteration=2)
    before = max(memory(one, "VmHWM") for one in workers())
    assert before > 0
    bombs = [zeros(_BOMB), hostile.envelope(zeros(_BOMB)), hostile.envelope(gzip.compress(zeros(_BOMB)))]
    for number, body in enumerate(bombs * 2, 1):
        api.contribute("bombs", body=body)
        wait_for_rejections(api, "bombs", task_id, number)
    after = max(memory(one, "VmHWM") for one in workers())
    assert after - before < 40, f"{before} MiB before, {after} MiB after"


def head_of(instruction, length):
    place = urlsplit(instruction.upload_location)
    lines = [f"PUT {place.path}?{place.query} HTTP/1.1", "host: localhost", f"content-length: {length}"]
    lines += [f"{name}: {value}" for name, value in instruction.extra_request_headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_hundred_large_uploads_under_way_leave_the_memory_of_the_server_flat(run_server, hand_made):
    import os

    running = run_server()
    api = running.api
    api.open_task("slow", hand_made.process_of(), goal=100, room=200)
    instructions = [api.upload_instruction(api.assignment("slow")) for _ in range(100)]
    half = bytes(4 * MIB)
    before = memory(os.getpid(), "VmRSS")
    port = urlsplit(api.url).port
    wires = [socket.create_connection(("127.0.0.1", port), 60) for _ in instructions]
    try:
        for wire, instruction in zip(wires, instructions, strict=True):
            wire.sendall(head_of(instruction, 16 * MIB) + half)
        assert api.http.get(f"{api.url}/healthz").status_code == 200
        after = memory(os.getpid(), "VmRSS")
    finally:
        for wire in wires:
            wire.close()
    assert after - before < 120, f"{before} MiB before, {after} MiB after {100 * 4} MiB had arrived"
    gradients = running.settings.data_dir / "blobs" / "gradient"
    api.wait(lambda: not [path for path in gradients.rglob("*") if path.is_file()], seconds=60)


def test_an_upload_that_drips_is_ended_and_one_that_flows_slowly_is_taken(run_server, hand_made, monkeypatch):
    from fedcompute.server.security import limits

    monkeypatch.setattr(limits, "PATIENCE_S", 1.0)
    api = run_server().api
    api.open_task("drip", hand_made.process_of(), goal=5)
    dripping, flowing = (api.upload_instruction(api.assignment("drip")) for _ in range(2))

    def drip():
        for _ in range(1000):
            yield b"x"
            time.sleep(0.1)

    def flow():
        for _ in range(10):
            yield bytes(20_000)
            time.sleep(0.2)

    started = time.monotonic()
    try:
        response = api.upload(dripping, drip())
        assert (response.status_code, response.json()["code"]) == (408, "request_too_slow")
    except OSError:
        pass
    except Exception as error:
        assert "write" in type(error).__name__.lower() or "remote" in type(error).__name__.lower(), error
    assert time.monotonic() - started < 30
    assert api.upload(flowing, flow()).status_code == 200


def test_one_session_cannot_take_the_places_of_many_nor_keep_one_for_ever(run_server, hand_made, reference):
    running = run_server(max_uploads=8, upload_timeout=4.0)
    api = running.api
    api.open_task("greedy", hand_made.process_of(), goal=9)
    greedy, other = (api.upload_instruction(api.assignment("greedy")) for _ in range(2))
    wires = [socket.create_connection(("127.0.0.1", urlsplit(api.url).port), 60) for _ in range(9)]
    try:
        started = time.monotonic()
        for wire in wires:
            wire.sendall(head_of(greedy, 100_000) + b"some")
        with ThreadPoolExecutor(len(wires)) as threads:
            answers = threads.map(lambda wire: reference.read_answer(wire.makefile("rb")), wires)
            assert api.upload(other, b"x").status_code == 200
            found = sorted((status, json.loads(body)["code"]) for status, _, body in answers)
        assert found == [(408, "request_too_slow")] * 6 + [(500, "server_busy")] * 3
        assert 3 < time.monotonic() - started < 60
    finally:
        for wire in wires:
            wire.close()


def test_uploads_that_lie_about_their_length_store_nothing(run_server, hand_made):
    running = run_server(max_upload_bytes=100_000)
    api = running.api
    api.open_task("lies", hand_made.process_of(), goal=5)
    instruction = api.upload_instruction(api.assignment("lies"))
    port = urlsplit(api.url).port

    def send(request, *, end=False):
        with socket.create_connection(("127.0.0.1", port), 60) as wire:
            wire.sendall(request)
            if end:
                wire.shutdown(socket.SHUT_WR)
            received = b""
            while part := wire.recv(65536):
                received += part
        return received

    assert send(head_of(instruction, 1000) + b"less", end=True)[:12] in (b"", b"HTTP/1.1 400")
    assert send(head_of(instruction, 10**15) + b"x").startswith(b"HTTP/1.1 413 ")
    gradients = running.settings.data_dir / "blobs" / "gradient"
    assert not [path for path in gradients.rglob("*") if path.is_file()]


def test_a_storm_of_hostile_and_honest_devices_ends_in_the_honest_model(run_server, reference, hand_made):
    api = run_server().api
    process = hand_made.process_of(CLIPPED)
    bodies = [
        body for name, (body, _) in Hostile(api, reference, hand_made, process).bodies().items() if "bomb" not in name
    ]
    task_id = api.open_task("storm", process, goal=2, rounds=3, room=12)
    stop = threading.Event()

    def harm(start):
        number = start
        while not stop.is_set():
            response = api.check_in("storm")
            if response.status_code == 201:
                answer = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(response.content)
                report = api.report(answer.task_assignment)
                told = task_assignments_pb2.ReportResultResponse.FromString(report.content).upload_instruction
                if told.upload_location:
                    api.upload(told, bodies[number % len(bodies)])
                    number += 4
            time.sleep(0.02)

    threads = [threading.Thread(target=harm, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    try:
        honest = [np.full(weight.shape, 0.25, np.float32) for weight in hand_made.initial]

        def helped():
            if api.task("storm", task_id)["task"]["status"] == "COMPLETED":
                return True
            response = api.check_in("storm")
            if response.status_code == 201:
                answer = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(response.content)
                told = task_assignments_pb2.ReportResultResponse.FromString(
                    api.report(answer.task_assignment).content
                ).upload_instruction
                if told.upload_location:
                    api.upload(told, api.seal(hand_made.update_of(process, honest)))
            return False

        api.wait(helped, seconds=120)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    before, after = (api.checkpoint("storm", task_id, number) for number in (0, 3))
    weights = [name for name in before if before[name].shape == (3, 2) and "trainable" in name] or [
        name for name in before if before[name].shape == (3, 2)
    ]
    change = after[weights[0]] - before[weights[0]]
    assert np.ptp(change) < 1e-4
    assert api.http.get(f"{api.url}/ready").status_code == 200
