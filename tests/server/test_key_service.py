"""Our client of an external key service, against two real coordinators on loopback that a test makes and breaks."""

import base64
import gzip
import json
import logging
import secrets
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedcompute.crypto.envelope import gzip_bytes, seal_update
from fedcompute.crypto.keys import PublicKey, parse_public_keys, public_keys_json
from fedcompute.errors import OperationFailed, Reason
from fedcompute.protos import keyset_pb2
from fedcompute.server.security.key_service import Coordinator, KeyClient, KeyService
from fedcompute.server.security.public_keys import PublicKeyList
from fedcompute.tensors.checkpoint import write_checkpoint


def keyset_of(private: X25519PrivateKey) -> bytes:
    value = keyset_pb2.HpkePrivateKey(
        public_key=keyset_pb2.HpkePublicKey(
            params=keyset_pb2.HpkeParams(kem=1, kdf=1, aead=3), public_key=private.public_key().public_bytes_raw()
        ),
        private_key=private.private_bytes_raw(),
    )
    data = keyset_pb2.KeyData(
        type_url="type.googleapis.com/google.crypto.tink.HpkePrivateKey",
        value=value.SerializeToString(),
        key_material_type=2,
    )
    key = keyset_pb2.Keyset.Key(key_data=data, status=1, key_id=11, output_prefix_type=3)
    return keyset_pb2.Keyset(primary_key_id=11, key=[key]).SerializeToString()


class Coordinators:
    """Two HTTP servers, each with one share of every key, and the list of public keys beside the first."""

    def __init__(self) -> None:
        self.public: list[PublicKey] = []
        self.answers: list[dict[str, tuple[int, bytes]]] = [{}, {}]
        self.asked: list[tuple[int, str, str | None]] = []
        self.broken = 0  # how many answers are 500 from now on
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(index)) for index in (0, 1)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, index: int) -> str:
        return f"http://127.0.0.1:{self._servers[index].server_port}/v1alpha"

    @property
    def service(self) -> KeyService:
        return KeyService(Coordinator(self.url(0)), Coordinator(self.url(1)), self.url(0) + "/publicKeys")

    @property
    def settings(self) -> dict[str, str]:
        return {
            "key_service_a": self.url(0),
            "key_service_b": self.url(1),
            "key_service_public_url": self.url(0) + "/publicKeys",
        }

    def add(self, *, locks=(None, None), kind="MULTI_PARTY_HYBRID_EVEN_KEYSPLIT", keyset=None) -> PublicKey:
        """A new key, published and split; `locks`: AES keys that encrypt the shares."""
        private, key_id = X25519PrivateKey.generate(), str(uuid.uuid4())
        whole = keyset_of(private) if keyset is None else keyset
        first = secrets.token_bytes(len(whole))
        shares = [first, bytes(one ^ other for one, other in zip(first, whole, strict=True))]
        for index, (share, lock) in enumerate(zip(shares, locks, strict=True)):
            if lock is not None:
                nonce = secrets.token_bytes(12)
                share = nonce + AESGCM(lock).encrypt(nonce, share, None)
            self.say(index, key_id, 200, self.document(key_id, share, kind))
        self.public.append(PublicKey(key_id, private.public_key().public_bytes_raw()))
        return self.public[-1]

    @staticmethod
    def document(key_id, share, kind) -> dict:
        return {
            "name": f"encryptionKeys/{key_id}",
            "encryptionKeyType": kind,
            "publicKeysetHandle": "ignored",
            "creationTime": "1760000000000",
            "somethingNew": {"deep": [1]},
            "keyData": [
                {"publicKeySignature": "", "keyEncryptionKeyUri": "", "keyMaterial": ""},
                {"keyEncryptionKeyUri": "kms://one", "keyMaterial": base64.b64encode(share).decode()},
            ],
        }

    def say(self, index, key_id, status, document) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.answers[index][key_id] = (status, body)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _handler(self, index):
        own = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                own.asked.append((index, self.path, self.headers.get("authorization")))
                status, body = own._answer(index, self.path)
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                if self.path.endswith("/publicKeys"):
                    self.send_header("cache-control", "public, max-age=5000")
                    self.send_header("age", "1000")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        return Handler

    def _answer(self, index, path) -> tuple[int, bytes]:
        if self.broken > 0:
            self.broken -= 1
            return 500, b"broken"
        if path.endswith("/publicKeys"):
            return 200, public_keys_json(self.public)
        key_id = path.removeprefix("/v1alpha/encryptionKeys/")
        missing = {
            "code": 5,
            "message": "no such key",
            "details": [{"reason": "NOT_FOUND", "domain": "", "metadata": {}}],
        }
        return self.answers[index].get(key_id, (404, json.dumps(missing).encode()))


@pytest.fixture
def coordinators():
    made = Coordinators()
    yield made
    made.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def client_of(coordinators, service=None, clock=None) -> KeyClient:
    return KeyClient(service or coordinators.service, clock=clock or Clock(), pause=lambda _: None)


def public_half(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def test_a_key_is_joined_from_both_coordinators_and_kept_for_seven_days(coordinators):
    key, clock = coordinators.add(), Clock()
    client = client_of(coordinators, clock=clock)
    assert public_half(client[key.id]) == key.key
    path = f"/v1alpha/encryptionKeys/{key.id}"
    assert coordinators.asked == [(0, path, None), (1, path, None)]
    clock.now = 7 * 86_400 - 1
    assert public_half(client[key.id]) == key.key
    assert len(coordinators.asked) == 2
    clock.now += 2
    assert public_half(client[key.id]) == key.key
    assert len(coordinators.asked) == 4


def test_no_more_than_a_hundred_keys_are_kept(coordinators):
    client = client_of(coordinators)
    keys = [coordinators.add() for _ in range(101)]
    assert all(client.get(key.id) for key in keys)
    assert len(client) == 100
    assert keys[0].id not in list(client)


def test_shares_are_decrypted_with_each_coordinators_own_key(coordinators, tmp_path):
    locks = [secrets.token_bytes(32), secrets.token_bytes(32)]
    for name, lock in zip("ab", locks, strict=True):
        (tmp_path / name).write_bytes(base64.b64encode(lock) + b"\n")
    key = coordinators.add(locks=locks)

    def service(first, second):
        return KeyService(
            Coordinator(coordinators.url(0), None, f"aes:{tmp_path / first}"),
            Coordinator(coordinators.url(1), None, f"aes:{tmp_path / second}"),
            "",
        )

    assert public_half(client_of(coordinators, service("a", "b"))[key.id]) == key.key
    assert client_of(coordinators, service("b", "a")).get(key.id) is None
    assert client_of(coordinators).get(key.id) is None
    with pytest.raises(OperationFailed) as raised:
        client_of(coordinators, service("a", "missing"))[key.id]
    assert raised.value.reason is Reason.KEY_SERVICE_FAILED


def test_programs_and_files_give_tokens_and_decrypt_shares(coordinators, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDCOMPUTE_SECRET", "s" * 40)
    decrypt = tmp_path / "kms.py"
    decrypt.write_text(
        "import base64, json, os, sys\n"
        "assert 'FEDCOMPUTE_SECRET' not in os.environ\n"
        "request = json.load(sys.stdin)\n"
        "assert request['key_uri'] == 'kms://one'\n"
        "print(base64.b64encode(bytes(b ^ 7 for b in base64.b64decode(request['ciphertext']))).decode())\n"
    )
    token = tmp_path / "token.py"
    token.write_text("import os\nprint('for-' + os.environ['AUDIENCE'].rpartition('/')[2])\n")
    (tmp_path / "token").write_text("first.token\n")
    key = coordinators.add()
    for index, answers in enumerate(coordinators.answers):
        document = json.loads(answers[key.id][1])
        share = base64.b64decode(document["keyData"][1]["keyMaterial"])
        document["keyData"][1]["keyMaterial"] = base64.b64encode(bytes(b ^ 7 for b in share)).decode()
        coordinators.say(index, key.id, 200, document)
    service = KeyService(
        Coordinator(coordinators.url(0), f"file:{tmp_path / 'token'}", f"command:{sys.executable} {decrypt}"),
        Coordinator(coordinators.url(1), f"command:{sys.executable} {token}", f"command:{sys.executable} '{decrypt}'"),
        "",
    )
    assert public_half(client_of(coordinators, service)[key.id]) == key.key
    assert [sent for _, _, sent in coordinators.asked] == ["Bearer first.token", "Bearer for-v1alpha"]
    assert "token" not in repr(service)
    decrypt.write_text("raise SystemExit(3)\n")
    with pytest.raises(OperationFailed) as raised:
        client_of(coordinators, service)[key.id]
    assert raised.value.reason is Reason.KEY_SERVICE_FAILED
    (tmp_path / "token").write_text("two words")
    with pytest.raises(OperationFailed) as raised:
        client_of(coordinators, service)[key.id]
    assert "two words" not in str(raised.value)


def test_a_key_that_the_coordinators_do_not_have_is_asked_for_three_times_in_ten_minutes(coordinators):
    clock = Clock()
    client, missing = client_of(coordinators, clock=clock), str(uuid.uuid4())
    for _ in range(5):
        assert client.get(missing) is None
    # The first coordinator's word is enough.
    assert [index for index, _, _ in coordinators.asked] == [0, 0, 0]
    clock.now = 601
    assert client.get(missing) is None
    assert len(coordinators.asked) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"encryptionKeyType": "SINGLE_PARTY_HYBRID_KEY"},
        {"encryptionKeyType": 0},
        {"encryptionKeyType": True},
        {"encryptionKeyType": None},
        {"name": "encryptionKeys/another"},
        {"keyData": []},
        {"keyData": "none"},
        {"keyData": [{"keyMaterial": ""}, 3, {"keyMaterial": 4}]},
        {"keyData": [{"keyMaterial": "no base64!"}]},
        {"keyData": [{"keyMaterial": "AAAA"}]},
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_a_key_that_is_not_ours_to_use_is_unknown_and_others_are_not(coordinators, change, index):
    key, good = coordinators.add(), coordinators.add()
    document = json.loads(coordinators.answers[index][key.id][1])
    coordinators.say(index, key.id, 200, {**document, **change})
    client = client_of(coordinators)
    assert client.get(key.id) is None
    assert public_half(client[good.id]) == good.key


def test_numbers_and_snake_case_are_proto_json_too(coordinators):
    key = coordinators.add()
    document = json.loads(coordinators.answers[0][key.id][1])
    part = document["keyData"][1]
    coordinators.say(
        0,
        key.id,
        200,
        {
            "encryption_key_type": 1,
            "key_data": [{"key_encryption_key_uri": "", "key_material": part["keyMaterial"]}],
        },
    )
    assert public_half(client_of(coordinators)[key.id]) == key.key


def test_shares_of_two_different_keys_join_to_nothing(coordinators):
    one, two = coordinators.add(), coordinators.add()
    coordinators.answers[1][one.id], document = (
        coordinators.answers[1][two.id],
        json.loads(coordinators.answers[1][two.id][1]),
    )
    coordinators.say(1, one.id, 200, {**document, "name": f"encryptionKeys/{one.id}"})
    assert client_of(coordinators).get(one.id) is None


@pytest.mark.parametrize("key_id", ["", "..", "../publicKeys", "a/b", "a?b", "a b", "\u00e4", "a" * 129, "%2e", "a\n"])
def test_an_id_that_is_no_id_is_never_sent(coordinators, key_id):
    assert client_of(coordinators).get(key_id) is None
    assert coordinators.asked == []


def test_an_id_that_a_coordinator_takes_for_none_is_unknown_and_stops_no_round(coordinators):
    coordinators.say(0, "made-up", 400, {"code": 3, "message": "no id of a key"})
    assert client_of(coordinators).get("made-up") is None


def test_a_short_outage_is_waited_out_and_a_long_one_is_typed(coordinators):
    key, pauses = coordinators.add(), []
    coordinators.broken = 2
    client = KeyClient(coordinators.service, pause=pauses.append)
    assert public_half(client[key.id]) == key.key
    assert pauses == sorted(pauses)
    assert len(pauses) == 2
    coordinators.broken = 1000
    other = coordinators.add()
    for _ in range(5):
        with pytest.raises(OperationFailed) as raised:
            client[other.id]
        assert raised.value.reason is Reason.KEY_SERVICE_FAILED
    coordinators.broken = 0
    # An outage is not held against a key.
    assert public_half(client[other.id]) == other.key


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"nginx"),
        (404, b'{"code": 7}'),
        (403, b"{}"),
        (200, b"[]"),
        (200, b"x"),
        (302, b""),
        (200, b" " * 300_000),
    ],
)
def test_an_answer_that_no_coordinator_gives_is_an_outage_and_costs_no_contribution(coordinators, status, body):
    key = coordinators.add()
    coordinators.say(1, key.id, status, body)
    with pytest.raises(OperationFailed) as raised:
        client_of(coordinators)[key.id]
    assert raised.value.reason is Reason.KEY_SERVICE_FAILED


def test_nothing_secret_is_logged_or_told(coordinators, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    key = coordinators.add()
    (tmp_path / "token").write_text("very.secret.token")
    service = KeyService(
        Coordinator(coordinators.url(0), f"file:{tmp_path / 'token'}"), Coordinator(coordinators.url(1)), ""
    )
    client = client_of(coordinators, service)
    private = client[key.id]
    coordinators.say(1, key.id, 200, {"encryptionKeyType": 1, "keyData": [{"keyMaterial": "c2VjcmV0IHNoYXJl"}]})
    assert client_of(coordinators, service).get(key.id) is None
    coordinators.broken = 1000
    with pytest.raises(OperationFailed) as raised:
        client_of(coordinators, service)[key.id]
    told = caplog.text + str(raised.value) + repr(client)
    for secret in ("very.secret.token", private.hex(), base64.b64encode(private).decode(), "c2VjcmV0", "secret share"):
        assert secret not in told


def test_a_published_key_that_the_coordinators_do_not_hold_gets_no_sums(coordinators):
    held = coordinators.add()
    for _ in range(5):
        coordinators.public.append(PublicKey(str(uuid.uuid4()), secrets.token_bytes(32)))
    # The list also lies about a key that exists.
    other = coordinators.add()
    coordinators.public[-1] = PublicKey(other.id, X25519PrivateKey.generate().public_key().public_bytes_raw())
    client = client_of(coordinators)
    assert {client.public_key() for _ in range(10)} == {held}
    coordinators.public = [one for one in coordinators.public if one != held]
    with pytest.raises(OperationFailed) as raised:
        client_of(coordinators).public_key()
    assert raised.value.reason is Reason.KEY_SERVICE_FAILED


def test_the_last_public_keys_stay_in_use_while_their_source_is_away(coordinators):
    clock = Clock()
    key = coordinators.add()
    client = client_of(coordinators, clock=clock)
    assert client.public_key() == key
    coordinators.broken = 1000
    clock.now = 9 * 3600
    assert client.public_key() == key
    with pytest.raises(OperationFailed):
        client_of(coordinators).public_key()


def test_devices_are_handed_the_list_with_what_is_left_of_its_age(coordinators):
    clock = Clock()
    key = coordinators.add()
    handed = PublicKeyList(coordinators.service.public_url, clock=clock)
    assert handed.publication().keys == (key,)
    assert handed.publication().max_age == 4000
    clock.now = 1500
    assert handed.publication().max_age == 2500
    assert len(coordinators.asked) == 1
    coordinators.broken = 1000
    clock.now = 4001
    # Never 0, of which devices make fourteen days.
    assert handed.publication().max_age == 3600
    assert handed.publication().keys == (key,)
    with pytest.raises(OperationFailed):
        PublicKeyList(coordinators.service.public_url).publication()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_service_a": "https://a"}, "key_service_b"),
        ({"key_service_b": "https://b", "key_service_public_url": "https://p"}, "key_service_a"),
        ({"key_service_a": "http://a", "key_service_b": "https://b", "key_service_public_url": "https://p"}, "https"),
        ({"key_service_token_a": "secret.token"}, "key_service_token_a"),
        ({"key_service_kms_b": "gcp-kms://x"}, "key_service_kms_b"),
    ],
)
def test_a_half_configured_key_service_is_refused_before_anything_starts(hand_made, tmp_path, changes, words):
    with pytest.raises(OperationFailed) as raised:
        hand_made.settings_of(tmp_path, **changes)
    assert raised.value.reason is Reason.SETTINGS_INVALID
    assert words in raised.value.detail
    assert "secret.token" not in raised.value.detail


def test_sums_are_encrypted_by_default_exactly_where_others_hold_the_keys(hand_made, tmp_path, coordinators):
    assert not hand_made.settings_of(tmp_path).seals_aggregates
    assert hand_made.settings_of(tmp_path, encrypt_aggregates=True).seals_aggregates
    assert hand_made.settings_of(tmp_path, **coordinators.settings).seals_aggregates
    assert not hand_made.settings_of(tmp_path, encrypt_aggregates=False, **coordinators.settings).seals_aggregates


def update(hand_made, process):
    return hand_made.update_of(process, [value * 0 + 1 for value in hand_made.initial])


def sealed_for(key, leaves):
    return gzip_bytes(seal_update(write_checkpoint(leaves), key))


def test_a_round_over_an_external_key_service_costs_an_unknown_key_one_contribution(
    run_server, hand_made, coordinators
):
    keys = [coordinators.add(), coordinators.add()]
    running = run_server(collector_batch_size=3, **coordinators.settings)
    api, process = running.api, hand_made.process_of()
    url = f"{api.url}/.well-known/odp/v1/public-keys"
    assert parse_public_keys(api.http.get(url).content) == keys
    assert api.http.get(url).headers["cache-control"].startswith("public, max-age=39")
    task_id = api.open_task("split", process, goal=3)
    leaves = update(hand_made, process)
    stranger = PublicKey(str(uuid.uuid4()), keys[0].key)
    for key in (keys[0], stranger, keys[1], keys[1]):
        api.contribute("split", body=sealed_for(key, leaves))
    found = api.wait_for("split", task_id, "COMPLETED")
    assert found["rejections"] == {"unknown_key": 1}
    # With the keys elsewhere sums are encrypted, and the next job opens them.
    sums = [path for path in (running.settings.data_dir / "blobs" / "aggregated").rglob("gradient") if path.is_file()]
    assert sums
    for path in sums:
        assert json.loads(gzip.decompress(path.read_bytes()))["keyId"] in {key.id for key in keys}


def test_an_outage_of_a_coordinator_delays_a_round_and_rejects_nobody(run_server, hand_made, coordinators):
    key = coordinators.add()
    running = run_server(job_attempts=1, **coordinators.settings)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("outage", process, goal=1)
    coordinators.broken = 1_000_000
    api.contribute("outage", body=sealed_for(key, update(hand_made, process)))
    api.wait(lambda: coordinators.broken < 1_000_000 - 6, seconds=60)
    time.sleep(0.2)
    assert api.task("outage", task_id)["task"]["status"] == "OPEN"
    coordinators.broken = 0

    def over():
        found = api.task("outage", task_id)
        return found if found["task"]["status"] == "COMPLETED" else None

    assert api.wait(over, seconds=90)["rejections"] == {}
