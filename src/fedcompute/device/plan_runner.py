"""Runs a client plan on local examples: checkpoint and examples in, update out (spec/device.md 5.5)."""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedcompute.errors import ArtifactInvalid, DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2

if TYPE_CHECKING:
    from fedcompute.device.translator import TranslatedGraph

UPDATE_BYTES_LIMIT = 1 << 30


@dataclass(frozen=True)
class PlanResult:
    """What one run made: the update checkpoint's bytes, and how many examples of how many bytes it drew."""

    update: bytes
    example_count: int
    example_bytes: int


@dataclass(frozen=True)
class _Prepared:
    graph: "TranslatedGraph"
    session: Any
    token: str
    checkpoint_path: str
    update_path: str


class PlanRunner:
    """Runs client plans, one at a time; keeps the graphs and sessions of the last few.

    Loading TensorFlow waits for the first run. Safe to share among the devices of a process.
    """

    def __init__(self, *, cached_plans: int = 4, time_limit: float = 600.0) -> None:
        """`cached_plans`: plans kept ready, about 10 MB each. `time_limit`: seconds that one run may compute."""
        self._cached_plans = cached_plans
        self._time_limit = time_limit
        self._plans: OrderedDict[bytes, _Prepared] = OrderedDict()
        self._lock = threading.Lock()
        # One worker thread is the queue of waiting runs, so they do not use up the threads of the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan-runner")

    async def train(self, plan: plan_pb2.ClientOnlyPlan, checkpoint: bytes, examples: Sequence[bytes]) -> PlanResult:
        """`run` for an event loop: waits for its turn without blocking the loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.run, plan, checkpoint, examples)

    def run(self, plan: plan_pb2.ClientOnlyPlan, checkpoint: bytes, examples: Sequence[bytes]) -> PlanResult:
        """Computes one update.

        `checkpoint`: a V1 checkpoint with the `client/...` leaves. `examples`: serialized records, in the order in
        which the plan sees them; they stay in memory. Raises DeviceRunFailed: PLAN_ARGUMENT_INVALID if the plan
        breaks a rule of its own, PLAN_COMPUTATION_FAILED if its graph cannot be built or fails, EXAMPLES_FAILED for
        an empty example, PLAN_UNSUPPORTED for a plan that is not for training.
        """
        validate(plan)
        empty = next((index for index, example in enumerate(examples) if not example), None)
        if empty is not None:
            raise DeviceRunFailed(Reason.EXAMPLES_FAILED, f"example {empty} of {len(examples)} has no bytes")
        with self._lock:
            prepared = self._prepare(plan)
            drawn = examples[: prepared.graph.example_limit]
            update = _compute(prepared, checkpoint, drawn, self._time_limit)
        return PlanResult(update, len(drawn), sum(len(example) for example in drawn))

    def close(self) -> None:
        """Ends the thread and the sessions; waits for a run in progress."""
        self._thread.shutdown(cancel_futures=True)
        with self._lock:
            for prepared in self._plans.values():
                prepared.session.close()
            self._plans.clear()

    def _prepare(self, plan: plan_pb2.ClientOnlyPlan) -> _Prepared:
        digest = hashlib.sha256(plan.SerializeToString(deterministic=True)).digest()
        if digest in self._plans:
            self._plans.move_to_end(digest)
            return self._plans[digest]
        prepared = _prepare(plan)
        self._plans[digest] = prepared
        while len(self._plans) > self._cached_plans:
            self._plans.popitem(last=False)[1].session.close()
        return prepared


def validate(plan: plan_pb2.ClientOnlyPlan) -> None:
    """Checks what a training plan says of itself (spec/device.md 5.2, 5.5), without its graph.

    Raises DeviceRunFailed: PLAN_UNSUPPORTED if it is not a plan that trains, else PLAN_ARGUMENT_INVALID.
    """
    phase = plan.phase
    if phase.WhichOneof("spec") != "tensorflow_spec":
        raise DeviceRunFailed(Reason.PLAN_UNSUPPORTED, f"a plan with {phase.WhichOneof('spec') or 'no computation'}")
    if not plan.tflite_graph:
        raise DeviceRunFailed(Reason.PLAN_UNSUPPORTED, "a training plan without a TFLite graph")
    spec, router = phase.tensorflow_spec, phase.federated_compute
    if phase.WhichOneof("io_router") != "federated_compute":
        raise DeviceRunFailed(Reason.PLAN_ARGUMENT_INVALID, "the plan has no federated_compute router")
    for output in spec.output_tensor_specs:
        if router.aggregations[output.name].WhichOneof("protocol_config") != "secure_aggregation":
            raise DeviceRunFailed(Reason.PLAN_ARGUMENT_INVALID, f"output {output.name} has no secure aggregation")
    routed = [name for name in (router.input_filepath_tensor_name, router.output_filepath_tensor_name) if name]
    if sorted(routed) != sorted(tensor.name for tensor in spec.input_tensor_specs):
        raise DeviceRunFailed(Reason.PLAN_ARGUMENT_INVALID, f"the inputs differ from the routed files {routed}")
    if spec.constant_inputs:
        raise DeviceRunFailed(Reason.PLAN_ARGUMENT_INVALID, "constant inputs are not accepted")


def _prepare(plan: plan_pb2.ClientOnlyPlan) -> _Prepared:
    import tensorflow as tf

    from fedcompute.device.translator import translate

    try:
        graph = translate(plan.tflite_graph)
    except ArtifactInvalid as cause:
        raise DeviceRunFailed(Reason.PLAN_COMPUTATION_FAILED, cause.detail, remedy=cause.remedy) from cause
    spec, router = plan.phase.tensorflow_spec, plan.phase.federated_compute
    fed = {
        spec.dataset_token_tensor_name,
        router.input_filepath_tensor_name,
        router.output_filepath_tensor_name,
    }
    unfed = sorted(name for name, tensor in graph.inputs.items() if name not in fed or tensor.dtype != tf.string)
    if unfed or len(graph.outputs) != len(spec.output_tensor_specs):
        raise DeviceRunFailed(
            Reason.PLAN_COMPUTATION_FAILED,
            f"the graph wants inputs {unfed} and has {len(graph.outputs)} outputs; the plan says otherwise",
        )
    # One thread and its own pools: a device must not crowd out what else its machine does.
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=1,
        inter_op_parallelism_threads=1,
        use_per_session_threads=True,
        device_count={"GPU": 0},
    )
    return _Prepared(
        graph,
        tf.compat.v1.Session(graph=graph.graph, config=config),
        spec.dataset_token_tensor_name,
        router.input_filepath_tensor_name,
        router.output_filepath_tensor_name,
    )


def _compute(prepared: _Prepared, checkpoint: bytes, examples: Sequence[bytes], time_limit: float) -> bytes:
    import numpy as np
    import tensorflow as tf

    with TemporaryDirectory(prefix="fedcompute-run-") as folder:
        checkpoint_file, update_file = Path(folder, "checkpoint"), Path(folder, "update")
        checkpoint_file.write_bytes(checkpoint)
        values = {
            prepared.token: b"examples",
            prepared.checkpoint_path: str(checkpoint_file),
            prepared.update_path: str(update_file),
        }
        feed: dict[Any, Any] = {tensor: values[name] for name, tensor in prepared.graph.inputs.items()}
        feed[prepared.graph.examples] = np.array(examples, dtype=object)
        options = tf.compat.v1.RunOptions(timeout_in_ms=int(time_limit * 1000))
        try:
            prepared.session.run(prepared.graph.target, feed, options=options)
        except (tf.errors.OpError, UnicodeDecodeError) as error:
            detail = _failure(error).replace(folder, "")
            raise DeviceRunFailed(Reason.PLAN_COMPUTATION_FAILED, detail) from error
        if not update_file.is_file():
            raise DeviceRunFailed(Reason.PLAN_COMPUTATION_FAILED, "the plan wrote no update")
        if update_file.stat().st_size > UPDATE_BYTES_LIMIT:
            raise DeviceRunFailed(Reason.PLAN_COMPUTATION_FAILED, f"an update of over {UPDATE_BYTES_LIMIT} bytes")
        return update_file.read_bytes()


def _failure(error: Exception) -> str:
    """What TensorFlow says of a failed run, without the example that it may quote."""
    if isinstance(error, UnicodeDecodeError):
        # TensorFlow quotes the bytes of an example that it cannot parse, and then cannot decode its own message.
        return "an example could not be parsed"
    # Its tale of where the graph was built wraps the plain error, which is the context.
    plain = error.__context__ if hasattr(error.__context__, "message") else error
    message = str(getattr(plain, "message", "")) or type(plain).__name__
    return message.partition(", value:")[0].splitlines()[0][:300]
