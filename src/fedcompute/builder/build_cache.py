"""Builds that need not be done twice: the same model and configuration, within one running service."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace

from fedcompute.builder.artifacts import BuiltGroup, BuiltTask
from fedcompute.builder.tasks import correlation_id
from fedcompute.protos import task_builder_pb2

MAX_BYTES = 256 << 20
MAX_ENTRIES = 64


@dataclass(frozen=True)
class _Entry:
    group: BuiltGroup
    report: bytes
    size: int


class BuildCache:
    """The last builds, at most `max_bytes` of artifacts. Not for threads.

    What is unique is never shared: a group that comes out has a fresh correlation id.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._max_bytes = max_bytes

    def get(self, key: bytes) -> BuiltGroup | None:
        """The group built under `key`, made fresh; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return _fresh(entry.group, task_builder_pb2.TaskReport.FromString(entry.report))

    def put(self, key: bytes, group: BuiltGroup) -> None:
        """Keeps a group, and forgets those that were not asked for longest."""
        parts = [built for built in (group.training, group.evaluation) if built is not None]
        size = sum(len(built.plan) + len(built.client_plan) + len(built.checkpoint) for built in parts)
        if size > self._max_bytes:
            return
        self._entries.pop(key, None)
        self._entries[key] = _Entry(group, group.report.SerializeToString(), size)
        while len(self._entries) > MAX_ENTRIES or sum(one.size for one in self._entries.values()) > self._max_bytes:
            self._entries.popitem(last=False)


def build_key(model: bytes, request: task_builder_pb2.BuildTaskRequest, settings: tuple[object, ...]) -> bytes:
    """What a build depends on: the model's fingerprint, configuration, flags, and the service's settings."""
    rest = task_builder_pb2.BuildTaskRequest(task_config=request.task_config, flags=request.flags)
    parts = (model, rest.SerializeToString(deterministic=True), repr(settings).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _fresh(group: BuiltGroup, report: task_builder_pb2.TaskReport) -> BuiltGroup:
    correlation = correlation_id()
    return BuiltGroup(_fresh_task(group.training, correlation), _fresh_task(group.evaluation, correlation), report)


def _fresh_task(built: BuiltTask | None, correlation: str) -> BuiltTask | None:
    if built is None:
        return None
    task = type(built.task)()
    task.CopyFrom(built.task)
    task.correlation_id = correlation
    return replace(built, task=task)
