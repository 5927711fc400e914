"""Key-value stores of a service (spec/device.md 7.4)."""

from fedcompute.device.developer.connection import Ask, Refused


class KeyValueStore:
    """Bytes by key, read-only. What may not or cannot be read is None, or an empty set: never an exception."""

    def __init__(self, ask: Ask, table: str) -> None:
        self._ask = ask
        self._table = table

    def get(self, key: str) -> bytes | None:
        """The value, None without one."""
        return self._value("get", _checked(key), key)

    def key_set(self) -> set[str]:
        """All keys."""
        try:
            return set(self._ask(f"{self._table}.key_set", (), list[str]))
        except Refused:
            return set()

    def _value(self, method: str, key: str, *arguments: object) -> bytes | None:
        if not key:
            return None
        try:
            value: bytes | None = self._ask(f"{self._table}.{method}", arguments, bytes | None)
        except Refused:
            return None
        return value


class MutableKeyValueStore(KeyValueStore):
    """A store that the service may write, where the operation allows it; elsewhere a write changes nothing."""

    def put(self, key: str, value: bytes) -> bytes | None:
        """Stores a value; returns the one before. Raises ValueError for an empty key, TypeError for no bytes."""
        if not _checked(key):
            raise ValueError("a key has at least one character")
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"the value of {key!r} is no bytes but {type(value).__name__}")
        return self._value("put", key, key, bytes(value))

    def remove(self, key: str) -> bytes | None:
        """Removes a value; returns it, None without one."""
        return self._value("remove", _checked(key), key)


def _checked(key: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a key is text, not {type(key).__name__}")
    return key
