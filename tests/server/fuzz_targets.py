"""What reads bytes of strangers, one function per reader; run as a program it fuzzes one of them with atheris.

    python tests/server/fuzz_targets.py TARGET [-max_total_time=60] [-seed=1] [CORPUS]

Without a target it reads orders, one JSON object `{"log": FILE, "arguments": [TARGET, ...]}` a line, follows each in a
fork of its own, which has everything imported, and answers with its exit status. A target may refuse with a typed
error; anything else, and any memory far beyond its input, is a finding.
"""

import contextlib
import functools
import gzip
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import h11
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import DecodeError

try:
    import atheris
except ImportError:
    atheris = None

_FUZZING = atheris is not None and __name__ == "__main__"
with atheris.instrument_imports(include=["fedcompute"]) if _FUZZING else contextlib.nullcontext():
    from fedcompute.crypto.envelope import gzip_bytes, open_update, seal_update
    from fedcompute.crypto.keys import PublicKey, parse_public_keys, public_keys_json
    from fedcompute.errors import FedComputeError
    from fedcompute.learning.contribution import add, empty_sum, read_contribution
    from fedcompute.learning.specification import initial_state, training_process
    from fedcompute.protos import learning_pb2, plan_pb2, task_assignments_pb2
    from fedcompute.server import connection
    from fedcompute.server.api.assignments import _client_version
    from fedcompute.server.rounds.plans import read_example_selector, read_server_plan
    from fedcompute.server.security import key_description
    from fedcompute.server.security.certificates import read_chain
    from fedcompute.server.security.proofs import read_proof
    from fedcompute.server.security.rates import client_address, read_networks
    from fedcompute.server.security.url_signing import Grant, check_url, sign_url
    from fedcompute.tensors.checkpoint import CheckpointLimits, read_checkpoint, write_checkpoint
    from fedcompute.tensors.partial_sum import decode, encode
    from fedcompute.tensors.tree import LeafSpec

LIMIT = 1 << 20
_FLOAT = np.dtype(np.float32)
_WEIGHTS = (LeafSpec("kernel", (3, 2), _FLOAT), LeafSpec("bias", (2,), _FLOAT))
_PROCESS = training_process(
    algorithm=learning_pb2.LearningProcess.FED_AVG,
    trainable=_WEIGHTS,
    non_trainable=(),
    server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
    aggregator=learning_pb2.FixedGaussian(clip_norm=10.0, noise_multiplier=1.0, report_goal=2),
    metrics=["sparse_categorical_accuracy"],
)
_SECRET = X25519PrivateKey.generate()
_KEYS = {"k": _SECRET.private_bytes_raw()}
_PUBLIC = PublicKey("k", _SECRET.public_key().public_bytes_raw())
_URL_KEY = bytes(32)
_NETWORKS = read_networks("10.0.0.0/8, 2001:db8::/32")


def _update() -> bytes:
    leaves = {
        leaf.spec.name: np.zeros([dim.size for dim in leaf.spec.shape.dim], np.float32) for leaf in _PROCESS.updates
    }
    return write_checkpoint(leaves)


def checkpoint(data: bytes) -> None:
    for leaf in read_checkpoint(data, CheckpointLimits(max_bytes=LIMIT)).values():
        assert leaf.nbytes <= 64 * len(data) + 4096 or leaf.dtype == object


def envelope(data: bytes) -> None:
    for allow in (False, True):
        with contextlib.suppress(FedComputeError):
            assert len(open_update(data, _KEYS, allow_plaintext=allow, limit=LIMIT)) <= LIMIT


def zipped_envelope(data: bytes) -> None:
    envelope(gzip.compress(data, 1))


def contribution(data: bytes) -> None:
    """A file that came in a perfect envelope."""
    opened = open_update(gzip_bytes(seal_update(data, _PUBLIC)), _KEYS, allow_plaintext=False, limit=LIMIT)
    assert opened == data
    one = read_contribution(_PROCESS, read_checkpoint(opened, CheckpointLimits(max_bytes=LIMIT)), 10.0)
    total = add(empty_sum(_PROCESS, b"d" * 32, 10.0), one)
    assert all(np.isfinite(value).all() for value in total.real.values())
    assert all((np.abs(value) < 2**62).all() for value in total.lattice.values())


def partial_sum(data: bytes) -> None:
    decode(data)


def messages(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        _client_version(task_assignments_pb2.CreateTaskAssignmentRequest.FromString(data))
    with contextlib.suppress(DecodeError):
        task_assignments_pb2.ReportResultRequest.FromString(data)


def plan(data: bytes) -> None:
    with contextlib.suppress(FedComputeError):
        read_server_plan(data, LIMIT)
    read_example_selector(data, LIMIT)


def proof(data: bytes) -> None:
    read_proof(data.decode("latin-1"))


def attestation(data: bytes) -> None:
    # What `describe_key` takes for a description that cannot be read.
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        key_description._read(data)


def certificate(data: bytes) -> None:
    key_description.describe_key(read_chain([data]))


def public_keys(data: bytes) -> None:
    parse_public_keys(data)


def signed_url(data: bytes) -> None:
    text = data.decode("latin-1")
    query = dict(part.partition("=")[::2] for part in text.split("&"))
    headers = {"content-type": text[:10]}
    try:
        check_url(_URL_KEY, method="PUT", bucket="b", path=text, query=query, headers=headers, now=1.0)
    except FedComputeError:
        return
    raise AssertionError("a made-up signature was taken")


def forwarded(data: bytes) -> None:
    peer, *values = data.decode("latin-1").split("\n")
    client_address(peer, values, _NETWORKS)


def request_head(data: bytes) -> None:
    parser = connection._Parser()
    middle = len(data) // 2
    try:
        for piece in (data[:middle], data[middle:]):
            if piece:
                parser.receive_data(piece)
            while (event := parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.ConnectionClosed):
                    return
                if isinstance(event, h11.Request):
                    size = sum(len(name) + len(value) for name, value in event.headers)
                    assert size <= connection.HEAD_BYTES_LIMIT
    except h11.RemoteProtocolError:
        assert parser.refused is not None


def _phones() -> ModuleType:
    """What makes attestations in the tests of devices."""
    spec = importlib.util.spec_from_file_location("phones", Path(__file__).with_name("security") / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _seeds() -> dict[str, list[bytes]]:
    file = _update()
    total = empty_sum(_PROCESS, b"d" * 32, 10.0)
    url = sign_url("http://localhost:1", bytes(31) + b"x", Grant("PUT", "b", "p/1", 9, {"content-type": "a"}))
    check_in = task_assignments_pb2.CreateTaskAssignmentRequest()
    check_in.client_version.version_code = "341717000"
    server_plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=_PROCESS).SerializeToString()
    client_plan = plan_pb2.ClientOnlyPlan(tflite_graph=b"TFL3")
    client_plan.phase.tensorflow_spec.example_selector.collection_uri = "app://x"
    strings = write_checkpoint({"s": np.array([b"a", b"", b"long" * 50], object), "n": np.arange(4, dtype=np.int64)})
    state = write_checkpoint(initial_state(_PROCESS, [np.ones((3, 2), np.float32), np.ones(2, np.float32)], ()))
    phones = _phones()
    leaf = phones.Maker().attest(b"challenge")[0]
    return {
        "checkpoint": [file, strings, state],
        "envelope": [gzip_bytes(seal_update(file, _PUBLIC)), file, seal_update(file, _PUBLIC)],
        "zipped_envelope": [seal_update(file, _PUBLIC), json.dumps({"keyId": "k", "a": [1, {"b": None}]}).encode()],
        "contribution": [file],
        "partial_sum": [encode(total)],
        "messages": [check_in.SerializeToString(), b"\x08\x01\x12\x02\x08\x01"],
        "plan": [server_plan, gzip_bytes(server_plan), client_plan.SerializeToString()],
        "proof": [b'["enrolment:v1","id","AAAA"]', b'["AAAA","BB=="]', b"[]"],
        "attestation": [phones.Claims(b"challenge").extension(), phones.Claims(has_root_of_trust=False).extension()],
        "certificate": [leaf],
        "public_keys": [public_keys_json([_PUBLIC])],
        "signed_url": [url.partition("?")[2].encode()],
        "forwarded": [b"10.0.0.1\n1.2.3.4, 10.2.2.2\n2001:db8::1", b"::ffff:10.0.0.1\nunknown"],
        "request_head": [
            b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
            b"PUT /b?c=d HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc",
        ],
    }


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (
        checkpoint, envelope, zipped_envelope, contribution, partial_sum, messages, plan, proof, attestation,
        certificate, public_keys, signed_url, forwarded, request_head,
    )
}  # fmt: skip
SEEDS = _seeds()


def try_one(target: str, data: bytes) -> None:
    """One input; a typed refusal is fine."""
    with contextlib.suppress(FedComputeError):
        TARGETS[target](data)


def mutations(target: str, number: int, seed: int = 1):
    """Valid inputs, changed: bytes flipped, cut, repeated, spliced, lengths blown up. The same for the same seed."""
    chance = random.Random(f"{target}/{seed}")
    for _ in range(number):
        data = bytearray(chance.choice(SEEDS[target]))
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(6):
                case 0 if at < len(data):
                    data[at] = chance.randrange(256)
                case 1 if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
                case 2:
                    del data[at : at + chance.choice((1, 2, 8, 64, 1 << 16))]
                case 3:
                    data[at:at] = chance.choice(
                        (b"\xff" * 10, b"\x80\x80\x80\x80\x10", b"\0", b"\x7f\xff\xff\xff", b"{", b'"')
                    )
                case 4:
                    data[at:at] = data[max(0, at - chance.choice((1, 8, 64))) : at]
                case _:
                    other = chance.choice(SEEDS[target])
                    data[at:] = other[chance.randrange(len(other) + 1) :]
        yield bytes(data)


def fuzz(target: str, *options: str) -> None:
    if options and not options[-1].startswith("-"):
        folder = Path(options[-1])
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(SEEDS[target]):
            (folder / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options], functools.partial(try_one, target))
    atheris.Fuzz()


def follow_orders() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                fuzz(*order["arguments"])
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    fuzz(*sys.argv[1:]) if sys.argv[1:] else follow_orders()
