"""Key-value stores as a service sees them (spec/device.md 7.4)."""

import pytest

from fedcompute.device.developer.connection import Refused
from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.key_values import KeyValueStore, MutableKeyValueStore


class Asked:
    """Answers questions from a dictionary, or refuses them all, and remembers what it was asked."""

    def __init__(self, values=(), refusal=None):
        self.values = dict(values)
        self.refusal = refusal
        self.questions = []

    def __call__(self, method, arguments, kind):
        self.questions.append((method, *arguments))
        if self.refusal is not None:
            raise Refused(self.refusal, "no")
        match method.partition(".")[2], *arguments:
            case "get", key:
                return self.values.get(key)
            case ("key_set",):
                return list(self.values)
            case "put", key, value:
                before = self.values.get(key)
                self.values[key] = value
                return before
            case "remove", key:
                return self.values.pop(key, None)


def test_values_come_by_their_key():
    store = KeyValueStore(Asked({"a": b"1", "b": b""}), "remote_data")
    assert (store.get("a"), store.get("b"), store.get("c")) == (b"1", b"", None)
    assert store.key_set() == {"a", "b"}


def test_writing_and_removing_give_what_was_there():
    asked = Asked()
    store = MutableKeyValueStore(asked, "local_data")
    assert store.put("k", b"1") is None
    assert store.put("k", bytearray(b"2")) == b"1"
    assert store.put("k", memoryview(b"3")) == b"2"
    assert store.remove("k") == b"3"
    assert store.remove("k") is None
    assert asked.questions == [
        ("local_data.put", "k", b"1"),
        ("local_data.put", "k", b"2"),
        ("local_data.put", "k", b"3"),
        ("local_data.remove", "k"),
        ("local_data.remove", "k"),
    ]


@pytest.mark.parametrize(
    "status",
    [Status.PERMISSION_DENIED, Status.LOCAL_DATA_READ_ONLY, Status.DATA_ACCESS, Status.LOCAL_WRITE, Status.INTERNAL],
)
def test_what_is_refused_is_nothing_and_never_an_exception(status):
    store = MutableKeyValueStore(Asked(refusal=status), "local_data")
    assert (store.get("k"), store.key_set(), store.put("k", b"v"), store.remove("k")) == (None, set(), None, None)


def test_an_empty_key_has_no_value_and_gets_none():
    asked = Asked({"": b"never seen"})
    store = MutableKeyValueStore(asked, "local_data")
    assert store.get("") is None
    assert store.remove("") is None
    with pytest.raises(ValueError, match="at least one character"):
        store.put("", b"v")
    assert asked.questions == []


@pytest.mark.parametrize("key", [None, 1, b"k", ["k"]])
def test_a_key_is_text(key):
    store = MutableKeyValueStore(Asked(), "local_data")
    for use in (store.get, store.remove, lambda key: store.put(key, b"v")):
        with pytest.raises(TypeError, match=f"a key is text, not {type(key).__name__}"):
            use(key)


@pytest.mark.parametrize("value", [None, "text", 1, [1, 2]])
def test_a_value_is_bytes(value):
    asked = Asked()
    with pytest.raises(TypeError, match=f"the value of 'k' is no bytes but {type(value).__name__}"):
        MutableKeyValueStore(asked, "local_data").put("k", value)
    assert asked.questions == []


def test_what_is_downloaded_or_remote_cannot_be_written():
    assert not hasattr(KeyValueStore(Asked(), "remote_data"), "put")
    assert not hasattr(KeyValueStore(Asked(), "downloaded_contents"), "remove")
