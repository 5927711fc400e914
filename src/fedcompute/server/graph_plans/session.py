"""A plan's server graph, loaded and checked, and sessions that run it. The server's one module that loads TensorFlow.

Where TensorFlow is not installed, loading a graph says so.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, FedComputeError, OperationFailed, Reason
from fedcompute.server.graph_plans.folders import private_folder
from fedcompute.server.graph_plans.operations import check_operations
from fedcompute.tensors.tree import LeafSpec, to_dtype

UNKNOWN = -1
_CACHED_GRAPHS = 4
_RUN_SECONDS = 600
_DISK_AT_FAULT = tuple(os.strerror(one) for one in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
# What follows is the data that the graph's author wanted to see: values of devices, maybe.
_QUOTES_VALUES = "assertion failed"


@dataclass(frozen=True)
class ServerGraph:
    """A graph ready for sessions; `files`: names of the tensors that take a file's path."""

    graph: Any
    files: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether there is a node of this name; of a tensor, the node that it comes from."""
        try:
            self.graph.get_operation_by_name(node_of(name))
        except (KeyError, ValueError):
            return False
        return True


class GraphRefused(OperationFailed):
    """An operation of a graph refuses a value that it was given, or misses one in a file."""


def node_of(name: str) -> str:
    """The node that a tensor comes from; a node's own name stays as it is."""
    return name.partition(":")[0]


@lru_cache(maxsize=_CACHED_GRAPHS)
def load_graph(definition: bytes, files: tuple[str, ...]) -> ServerGraph:
    """Loads a serialized GraphDef; the last few are kept.

    `files`: names of the tensors that take the paths of files. Raises ArtifactInvalid: PLAN_MALFORMED for bytes that
    are no graph, PLAN_UNSUPPORTED as `check_operations`, and where TensorFlow is not installed.
    """
    tf = _tensorflow()
    message = tf.compat.v1.GraphDef()
    try:
        message.ParseFromString(definition)
    except Exception as cause:  # the exception's type depends on protobuf's implementation
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{len(definition)} bytes are no graph") from cause
    check_operations(message, {node_of(name) for name in files})
    for node in message.node:
        # The builder's machine says nothing about ours.
        node.device = ""
    graph = tf.Graph()
    try:
        with graph.as_default():
            tf.import_graph_def(message, name="")
        for name in files:
            if _tensor(graph, name).dtype != tf.string:
                raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{name!r} takes no file's path")
    except FedComputeError:
        raise
    except Exception as cause:  # shape inference and op construction refuse in many ways; the plan is at fault in all
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"the server graph does not load: {_said(cause)}") from cause
    graph.finalize()
    return ServerGraph(graph, files)


class GraphSession:
    """One session, with variables of its own, and the folder of its files; made by `session`."""

    def __init__(self, loaded: ServerGraph, session: Any, folder: Path) -> None:
        self._loaded = loaded
        self._session = session
        self._folder = folder
        self._numbers = itertools.count(1)

    def run(
        self, targets: Sequence[str] = (), fetch: Sequence[str] = (), files: Mapping[str, Path] | None = None
    ) -> list[NDArray[Any]]:
        """Runs nodes in one step; returns the values of the tensors `fetch`.

        `files`: tensor -> path; a file tensor that is not among them leads to a file that is not there, inside the
        session's folder. Raises OperationFailed: GRAPH_FAILED, and that as GraphRefused where a value is at fault;
        STORAGE_FAILED for a disk that is.
        """
        tf = _tensorflow()
        graph, chosen = self._loaded.graph, files or {}
        unused = self._folder / "unused"
        try:
            feed = {_tensor(graph, name): str(chosen.get(name, unused)) for name in self._loaded.files}
            operations = [graph.get_operation_by_name(node_of(name)) for name in targets if name]
            tensors = [_tensor(graph, name) for name in fetch]
            options = tf.compat.v1.RunOptions(timeout_in_ms=_RUN_SECONDS * 1000)
            _, values = self._session.run((operations, tensors), feed, options=options)
        except (tf.errors.InvalidArgumentError, tf.errors.NotFoundError, tf.errors.OutOfRangeError) as cause:
            raise GraphRefused(Reason.GRAPH_FAILED, self._told(cause)) from cause
        except tf.errors.OpError as cause:
            told = self._told(cause)
            # TensorFlow has an error of its own for every way to say this.
            full = any(sentence in str(cause.message) for sentence in _DISK_AT_FAULT)
            raise OperationFailed(Reason.STORAGE_FAILED if full else Reason.GRAPH_FAILED, told) from cause
        except (KeyError, ValueError, TypeError) as cause:
            raise OperationFailed(Reason.GRAPH_FAILED, f"the graph does not run: {_said(cause)}") from cause
        return [np.asarray(value) for value in values]

    @contextlib.contextmanager
    def file(self, data: bytes | None = None) -> Iterator[Path]:
        """A path of its own in the session's folder, with `data` in it or nothing there yet; gone at the end."""
        path = self._folder / str(next(self._numbers))
        try:
            if data is not None:
                path.write_bytes(data)
            yield path
        except OSError as cause:
            raise OperationFailed(Reason.STORAGE_FAILED, f"a file of a graph: {cause.strerror}") from cause
        finally:
            path.unlink(missing_ok=True)

    def _told(self, error: Exception) -> str:
        return f"the server graph failed: {_said(error).replace(str(self._folder), '')}"


@contextlib.contextmanager
def session(loaded: ServerGraph) -> Iterator[GraphSession]:
    """A session of a loaded graph; its variables and files go with it. Runs on one thread, so sums have one order.

    Raises OperationFailed (STORAGE_FAILED) where there is no place for files.
    """
    tf = _tensorflow()
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=1,
        inter_op_parallelism_threads=1,
        use_per_session_threads=True,
        device_count={"GPU": 0},
    )
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(private_folder())
        except OSError as cause:
            raise OperationFailed(Reason.STORAGE_FAILED, f"a folder for a graph's files: {cause.strerror}") from cause
        yield GraphSession(loaded, stack.enter_context(tf.compat.v1.Session(graph=loaded.graph, config=config)), folder)


def restored_leaves(loaded: ServerGraph, node: str) -> dict[str, LeafSpec]:
    """What a restore node reads from its file: leaf name -> spec; a size that the graph leaves open is UNKNOWN.

    Raises ArtifactInvalid (PLAN_UNSUPPORTED) where a leaf is put anywhere but straight into a variable.
    """
    tf = _tensorflow()
    found: dict[str, LeafSpec] = {}
    read: set[str] = set()
    for operation in _ancestors(loaded.graph.get_operation_by_name(node_of(node))):
        if operation.type == "RestoreV2":
            read |= set(_restored_names(tf, operation))
        if operation.type != "AssignVariableOp":
            continue
        value = operation.inputs[1]
        while value.op.type == "Identity":
            value = value.op.inputs[0]
        handle = operation.inputs[0].op
        if value.op.type == "RestoreV2" and handle.type == "VarHandleOp":
            name = _restored_names(tf, value.op)[value.value_index]
            shape = handle.get_attr("shape")
            if not shape.unknown_rank:
                sizes = tuple(dim.size if dim.size >= 0 else UNKNOWN for dim in shape.dim)
                found[name] = LeafSpec(name, sizes, to_dtype(value.dtype.as_datatype_enum))
    if missing := sorted(read - found.keys()):
        raise ArtifactInvalid(
            Reason.PLAN_UNSUPPORTED, f"{node!r} reads {missing[0]!r} into no variable of a known number of dimensions"
        )
    return found


def _restored_names(tf: Any, operation: Any) -> list[str]:
    names = tf.get_static_value(operation.inputs[1])
    if names is None:
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"{operation.name!r} reads leaves that are not named in advance")
    return [name.decode() for name in names]


def _ancestors(operation: Any) -> Iterator[Any]:
    waiting, seen = [operation], {operation.name}
    while waiting:
        one = waiting.pop()
        yield one
        for parent in [*(tensor.op for tensor in one.inputs), *one.control_inputs]:
            if parent.name not in seen:
                seen.add(parent.name)
                waiting.append(parent)


def _tensor(graph: Any, name: str) -> Any:
    return graph.get_tensor_by_name(name if ":" in name else f"{name}:0")


def _said(error: Exception) -> str:
    """The first line of what TensorFlow says, without where the graph was built and without the values of a tensor."""
    plain = error.__context__ if hasattr(error.__context__, "message") else error
    message = str(getattr(plain, "message", "") or plain) or type(plain).__name__
    first = message.strip().splitlines()[0]
    return first.partition(_QUOTES_VALUES)[0] + _QUOTES_VALUES if _QUOTES_VALUES in first else first[:300]


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError as cause:
        raise ArtifactInvalid(
            Reason.PLAN_UNSUPPORTED,
            "the plan's server half is a TensorFlow graph, and TensorFlow is not installed on this server",
            remedy="install the extra on the server (pip install 'fedcompute[tensorflow]'), or build the plan with "
            "this system's task builder",
        ) from cause
    return tensorflow
