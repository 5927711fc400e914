"""What a build gives, as plain data that any process can hold without TensorFlow."""

from dataclasses import dataclass

from fedcompute.protos import task_builder_pb2, task_pb2


@dataclass(frozen=True)
class BuiltTask:
    """One task and its three artifacts, serialized."""

    task: task_pb2.Task
    plan: bytes
    client_plan: bytes
    checkpoint: bytes


@dataclass(frozen=True)
class BuiltGroup:
    """What a build gives; `training` is None in mode EVAL_ONLY, `evaluation` in mode TRAINING_ONLY."""

    training: BuiltTask | None
    evaluation: BuiltTask | None
    report: task_builder_pb2.TaskReport
