"""Where each object lies: bucket names and paths (spec/server.md 8).

`result_id` is the iteration whose result an object is; 0 holds what the builder uploads. Paths have no leading slash.
"""

import hashlib
from collections.abc import Sequence

from fedcompute.storage.keys import TaskKey

MODEL = "model"
GRADIENT = "gradient"
AGGREGATED = "aggregated"
BUCKETS = (MODEL, GRADIENT, AGGREGATED)


def client_only_plan_path(task: TaskKey) -> str:
    """The plan that devices download; bucket `model`."""
    return f"{task}/0/s/0/client_only_plan"


def server_plan_path(task: TaskKey) -> str:
    """The whole plan, for the server; bucket `model`."""
    return f"{task}/0/s/0/server_phase"


def initial_checkpoint_path(task: TaskKey) -> str:
    """The server state before round 1; bucket `model`."""
    return server_checkpoint_path(task, 0)


def server_checkpoint_path(task: TaskKey, result_id: int) -> str:
    """The server state after a round; bucket `model`."""
    return f"{task}/{result_id}/s/0/checkpoint"


def client_checkpoint_path(task: TaskKey, result_id: int) -> str:
    """What devices of the following round start from; bucket `model`."""
    return f"{task}/{result_id}/d/0/client_checkpoint"


def metrics_path(task: TaskKey, result_id: int) -> str:
    """A round's metrics, one JSON object; bucket `model`."""
    return f"{task}/{result_id}/s/0/metrics"


def updates_prefix(task: TaskKey, result_id: int) -> str:
    """The folder of a round's device updates; bucket `gradient`."""
    return f"{task}/{result_id}/d"


def update_path(task: TaskKey, result_id: int, session_id: str) -> str:
    """One device's update; bucket `gradient`."""
    return f"{updates_prefix(task, result_id)}/{session_id}/gradient"


def aggregates_prefix(task: TaskKey, result_id: int, level: int = 0) -> str:
    """The folder of a round's partial sums; bucket `aggregated`."""
    return f"{task}/{result_id}/s/0/{level}"


def aggregate_path(task: TaskKey, result_id: int, batch_id: str, level: int = 0) -> str:
    """One batch's partial sum; bucket `aggregated`."""
    return f"{aggregates_prefix(task, result_id, level)}/{batch_id}/gradient"


def merged_path(task: TaskKey, result_id: int, batch_ids: Sequence[str]) -> str:
    """The sum of these batches, in this order; bucket `aggregated`, level 1, in the folder of the first of them."""
    name = hashlib.sha256("/".join(batch_ids).encode()).hexdigest()[:32]
    return f"{aggregates_prefix(task, result_id, 1)}/{batch_ids[0]}/{name}"


def failure_path(task: TaskKey) -> str:
    """Why a task failed, one JSON object; bucket `model`."""
    return f"{task}/0/s/0/failure"


def result_folder(task: TaskKey, result_id: int) -> str:
    """The folder of everything about one round, in each bucket; that of round 0 holds the task's artifacts."""
    return f"{task}/{result_id}"
