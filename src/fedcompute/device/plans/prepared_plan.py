"""A client plan as a graph in a session, ready to run (spec/device.md 5.5). Loads TensorFlow."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tensorflow as tf

from fedcompute.device.plans.translator import translate
from fedcompute.errors import ArtifactInvalid, DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2

# They read examples and checkpoints, and tell of names and sizes; what other kernels say may quote the data.
_PLAIN_SPOKEN = ("ParseExample", "RestoreV2", "SaveSlices")
_ABOUT_SHAPES = re.compile(r"(Matrix size-incompatible|Incompatible shapes|Input to reshape)\b")
_INSIDE_A_DATA_SET = re.compile(r"Error in user-defined function passed to .*? with iterator: [\w:]+: ")
_NODE = re.compile(r"\{\{node ([^}]+)\}\}")


class PreparedPlan:
    """One plan's session, whose later runs cost no translation."""

    def __init__(self, plan: plan_pb2.ClientOnlyPlan) -> None:
        """Translates a validated plan; nothing of it runs yet.

        Raises DeviceRunFailed: OPS_NOT_SUPPORTED naming every operation that does not run here, PLAN_UNSUPPORTED for
        what is refused for another reason, PLAN_COMPUTATION_FAILED for a graph that cannot be built.
        """
        try:
            self._graph = translate(plan.tflite_graph)
        except ArtifactInvalid as cause:
            malformed = cause.reason is Reason.PLAN_MALFORMED
            reason = Reason.PLAN_COMPUTATION_FAILED if malformed else cause.reason
            raise DeviceRunFailed(reason, cause.detail, remedy=cause.remedy) from cause
        spec, router = plan.phase.tensorflow_spec, plan.phase.federated_compute
        self._token = spec.dataset_token_tensor_name
        self._checkpoint_path = router.input_filepath_tensor_name
        self._update_path = router.output_filepath_tensor_name
        fed = {self._token, self._checkpoint_path, self._update_path}
        inputs = self._graph.inputs.items()
        unfed = sorted(name for name, tensor in inputs if name not in fed or tensor.dtype != tf.string)
        if unfed or len(self._graph.outputs) != len(spec.output_tensor_specs):
            raise DeviceRunFailed(
                Reason.PLAN_COMPUTATION_FAILED,
                f"the graph wants inputs {unfed} and has {len(self._graph.outputs)} outputs; the plan says otherwise",
            )
        # One thread and its own pools: a device must not crowd out what else its machine does.
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=1,
            inter_op_parallelism_threads=1,
            use_per_session_threads=True,
            device_count={"GPU": 0},
        )
        self._session = tf.compat.v1.Session(graph=self._graph.graph, config=config)

    def run(
        self, checkpoint: bytes, examples: Sequence[bytes], *, time_limit: float, update_bytes_limit: int
    ) -> tuple[bytes, Sequence[bytes]]:
        """The update, and the examples that were drawn.

        Raises DeviceRunFailed: PLAN_COMPUTATION_FAILED if the graph fails, also over `time_limit` seconds or after
        `stop`; UPLOAD_TOO_LARGE for an update of over `update_bytes_limit` bytes.
        """
        drawn = examples[: self._graph.example_limit]
        with TemporaryDirectory(prefix="fedcompute-run-") as folder:
            checkpoint_file, update_file = Path(folder, "checkpoint"), Path(folder, "update")
            checkpoint_file.write_bytes(checkpoint)
            values = {
                self._token: b"examples",
                self._checkpoint_path: str(checkpoint_file),
                self._update_path: str(update_file),
            }
            feed: dict[Any, Any] = {tensor: values[name] for name, tensor in self._graph.inputs.items()}
            feed[self._graph.examples] = np.array(drawn, dtype=object)
            self._compute(feed, folder, time_limit)
            if not update_file.is_file():
                raise DeviceRunFailed(Reason.PLAN_COMPUTATION_FAILED, "the plan wrote no update")
            size = update_file.stat().st_size
            if size > update_bytes_limit:
                detail = f"an update of {size} bytes, {update_bytes_limit} are the limit"
                raise DeviceRunFailed(Reason.UPLOAD_TOO_LARGE, detail)
            return update_file.read_bytes(), drawn

    def stop(self) -> None:
        """Ends a run in progress on another thread, and the session; returns when the run no longer computes.

        TensorFlow looks for it before every turn of a loop and every element of a data set, so the wait is that for
        one operation.
        """
        self._session.close()

    def _compute(self, feed: dict[Any, Any], folder: str, time_limit: float) -> None:
        options = tf.compat.v1.RunOptions(timeout_in_ms=max(1, int(time_limit * 1000)))
        start = time.perf_counter()
        try:
            self._session.run(self._graph.target, feed, options=options)
        except (tf.errors.OpError, UnicodeDecodeError, RuntimeError) as error:
            if isinstance(error, tf.errors.DeadlineExceededError):
                seconds = time.perf_counter() - start
                detail = f"stopped after {seconds:.1f} s; a run may compute for {time_limit:g} s"
                remedy = "give the task fewer batches per device (max_training_batches_per_client)"
                raise DeviceRunFailed(Reason.PLAN_COMPUTATION_FAILED, detail, remedy=remedy) from error
            raise DeviceRunFailed(Reason.PLAN_COMPUTATION_FAILED, _failure(error).replace(folder, "")) from error


def _failure(error: Exception) -> str:
    """What TensorFlow says of a failed run, without the examples that it may quote."""
    if isinstance(error, UnicodeDecodeError):
        # TensorFlow quotes the bytes of an example that it cannot parse, and then cannot decode its own message.
        return "an example could not be parsed"
    # Its tale of where the graph was built wraps the plain error, which is the context.
    plain = error.__context__ if hasattr(error.__context__, "message") else error
    message = str(getattr(plain, "message", "")) or type(plain).__name__
    node = match[1] if (match := _NODE.search(message)) else ""
    said = _INSIDE_A_DATA_SET.sub("", message.splitlines()[0])
    if node.rpartition("/")[2].startswith(_PLAIN_SPOKEN) or _ABOUT_SHAPES.match(said):
        return said.partition(", value:")[0][:300]
    return f"{type(plain).__name__} in {node or 'the graph'}"
