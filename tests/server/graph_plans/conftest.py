"""Plans with server graphs of both forms, made by hand as the reference makes them, and a plain session to compare."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.protos import plan_pb2
from fedcompute.tensors.checkpoint import write_checkpoint

v1 = tf.compat.v1
REFERENCE = Path(__file__).resolve().parents[3] / "../shared/fixtures/reference-keras/output"
SHAPES = ((3, 2), (2,))
UPDATE = {
    "update/0": ((), tf.int32),
    "update/1/loss/0": ((), tf.float32),
    "update/1/loss/1": ((), tf.float32),
    **{f"update/2/{i}": (shape, tf.float32) for i, shape in enumerate(SHAPES)},
}
STATE = {
    **{f"server/global_model_weights/trainable/{i}": (shape, tf.float32) for i, shape in enumerate(SHAPES)},
    "server/finalizer/learning_rate": ((), tf.float32),
    "server/aggregator/stddev": ((), tf.float32),
}
WEIGHTS = [name for name in STATE if "trainable" in name]
METRIC = {"TRAINING": "client_work/train/loss", "EVALUATION": "eval/loss"}


def initial_state(stddev=0.0):
    return {
        WEIGHTS[0]: np.arange(6, dtype=np.float32).reshape(3, 2) / 10,
        WEIGHTS[1]: np.array([0.5, -0.5], np.float32),
        "server/finalizer/learning_rate": np.array(0.5, np.float32),
        "server/aggregator/stddev": np.array(stddev, np.float32),
    }


def update_of(seed):
    rng = np.random.default_rng(seed)
    return {
        "update/0": np.array(1, np.int32),
        "update/1/loss/0": np.array(rng.random(), np.float32),
        "update/1/loss/1": np.array(3, np.float32),
        **{f"update/2/{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(SHAPES)},
    }


def one_graph(kind="TRAINING", before_sum=None):
    """A plan of the first form: a weighted mean, gradient descent, noise of a standard deviation from the state.

    `before_sum`: makes operations that must succeed before the number of devices is added.
    """
    graph = tf.Graph()
    with graph.as_default():

        def variables(leaves, prefix=None):
            named = {name: name if prefix is None else f"{prefix}/0/{name.partition('/')[2]}" for name in leaves}
            return {
                new: v1.get_variable(new, initializer=tf.zeros(*leaves[old]), use_resource=True)
                for old, new in named.items()
            }

        state, update = variables(STATE), variables(UPDATE)
        metrics = variables({f"metrics/{METRIC[kind]}": ((), tf.float32)})
        partial, total = variables(UPDATE, "intermediate_update"), variables(UPDATE, "aggregated_update")
        client = variables({f"client/0/trainable/{i}": (shape, tf.float32) for i, shape in enumerate(SHAPES)})

        def saver(name, some):
            made = v1.train.Saver(some, name=name, write_version=v1.train.SaverDef.V1)
            return made.as_saver_def()

        def initial(some, name):
            return tf.group(*(one.initializer for one in some.values()), name=name)

        def added(into, values, guard=None):
            steps = []
            for variable, value in zip(into.values(), values.values(), strict=True):
                guards = [guard()] if guard is not None and not steps else []
                with tf.control_dependencies(guards):
                    steps.append(variable.assign_add(tf.identity(value), read_value=False))
            return tf.group(*steps).name

        savers = {
            "server": saver("server_savepoint", state),
            "client": saver("client_savepoint", client),
            "update": saver("update_savepoint", update),
            "partial": saver("intermediate_update_savepoint", partial),
            "total": saver("aggregated_update_savepoint", total),
        }
        savers["server"].save_tensor_name = saver("save_server_savepoint", {**state, **metrics}).save_tensor_name
        # Both are told their file by one name, as in the reference's graphs.
        for one in graph.get_operations():
            if one.type in ("SaveSlices", "RestoreV2") and one.name.startswith("save_server_savepoint/"):
                one._update_input(0, graph.get_tensor_by_name("server_savepoint/Const:0"))

        everything = tf.group(
            initial(state, "initialize_state"), initial(metrics, "initialize_metrics"), name="initialize_server"
        )
        phase_init = tf.group(initial(partial, "zero_partial"), initial(total, "zero_total"))
        read = initial(update, "initialize_update_vars")
        guard = None if before_sum is None else lambda: before_sum(update)
        accumulate = added(partial, update, guard)
        merge = added(total, partial)
        sums = [tf.identity(one) for one in total.values()]
        steps = [next(iter(metrics.values())).assign(sums[1] / sums[2])]
        if kind == "TRAINING":
            for name, summed in zip(WEIGHTS, sums[3:], strict=True):
                noise = tf.random.normal(tf.shape(summed)) * state["server/aggregator/stddev"]
                mean = (summed + noise) / tf.cast(sums[0], tf.float32)
                moved = state[name] - state["server/finalizer/learning_rate"] * mean
                steps.append(state[name].assign(moved))
        apply = tf.group(*steps)
        told = tf.group(
            *(variable.assign(state[name]) for variable, name in zip(client.values(), WEIGHTS, strict=True))
        )
        metric = tf.identity(next(iter(metrics.values())).read_value())

    def checkpoint_op(saver_def, **operations):
        made = plan_pb2.CheckpointOp(**operations)
        made.saver_def.ParseFromString(saver_def.SerializeToString())
        return made

    phase = plan_pb2.ServerPhase(
        phase_init_op=phase_init.name,
        write_client_init=checkpoint_op(savers["client"], before_save_op=told.name),
        read_update=checkpoint_op(savers["update"], before_restore_op=read.name),
        aggregate_into_accumulators_op=accumulate,
        write_intermediate_update=checkpoint_op(savers["partial"]),
        read_intermediate_update=checkpoint_op(savers["partial"]),
        intermediate_aggregate_into_accumulators_op=merge,
        write_accumulators=checkpoint_op(savers["total"]),
        apply_aggregrated_updates_op=apply.name,
        metrics=[plan_pb2.Metric(variable_name=metric.name, stat_name=f"server/{METRIC[kind]}")],
    )
    plan = plan_pb2.Plan(
        version=1,
        phase=[plan_pb2.Plan.Phase(server_phase=phase)],
        server_savepoint=checkpoint_op(savers["server"], before_restore_op=everything.name),
    )
    plan.server_graph_bytes.value = graph.as_graph_def().SerializeToString()
    return plan


def two_graphs(kind="TRAINING"):
    """The same learning as `one_graph`, in the second form."""
    plan = plan_pb2.Plan(version=1, phase=[plan_pb2.Plan.Phase()])
    phase = plan.phase[0].server_phase_v2

    def placeholder(name):
        return v1.placeholder(tf.string, [], name)

    def restored(path, leaves):
        return {
            name: tf.raw_ops.RestoreV2(prefix=path, tensor_names=[name], shape_and_slices=[""], dtypes=[dtype])[0]
            for name, (_, dtype) in leaves.items()
        }

    def save(path, leaves, name):
        tf.raw_ops.SaveSlices(
            filename=path,
            tensor_names=list(leaves),
            shapes_and_slices=[""] * len(leaves),
            data=list(leaves.values()),
            name=name,
        )

    def spec(into, names):
        for name in names:
            into.input_tensor_specs.add(name=f"{name}:0", dtype=7)

    with tf.Graph().as_default() as graph:
        names = [
            "server_state_input_filepath",
            "server_prepare_output_filepath",
            "server_intermediate_state_output_filepath",
        ]
        state_file, client_file, kept_file = map(placeholder, names)
        state = restored(state_file, STATE)
        save(
            client_file,
            {f"client/0/trainable/{i}": state[name] for i, name in enumerate(WEIGHTS)},
            "save_prepared_values_tensors",
        )
        save(
            kept_file,
            {f"intermediate_state/0/{name.partition('/')[2]}": value for name, value in state.items()},
            "save_intermediate_state_values_tensors",
        )
    plan.server_graph_prepare_bytes.value = graph.as_graph_def().SerializeToString()
    spec(phase.tensorflow_spec_prepare, names)
    phase.tensorflow_spec_prepare.target_node_names.extend(
        ["save_prepared_values_tensors", "save_intermediate_state_values_tensors"]
    )
    phase.prepare_router.prepare_server_state_input_filepath_tensor_name = f"{names[0]}:0"
    phase.prepare_router.prepare_output_filepath_tensor_name = f"{names[1]}:0"
    phase.prepare_router.prepare_intermediate_state_output_filepath_tensor_name = f"{names[2]}:0"

    with tf.Graph().as_default() as graph:
        names = [
            "server_intermediate_state_input_filepath",
            "aggregate_result_input_filepath",
            "server_state_output_filepath",
        ]
        kept_file, aggregate_file, state_file = map(placeholder, names)
        kept = {f"intermediate_state/0/{name.partition('/')[2]}": leaf for name, leaf in STATE.items()}
        state = dict(zip(STATE, restored(kept_file, kept).values(), strict=True))
        summed = {f"intermediate_update/0/{name.partition('/')[2]}": leaf for name, leaf in UPDATE.items()}
        sums = list(restored(aggregate_file, summed).values())
        metric = tf.identity(sums[1] / sums[2], name=f"server/{METRIC[kind]}")
        new = dict(state)
        if kind == "TRAINING":
            for name, total in zip(WEIGHTS, sums[3:], strict=True):
                noise = tf.random.normal(tf.shape(total)) * state["server/aggregator/stddev"]
                mean = (total + noise) / tf.cast(sums[0], tf.float32)
                new[name] = state[name] - state["server/finalizer/learning_rate"] * mean
        save(state_file, {**new, f"metrics/{METRIC[kind]}": metric}, "save_server_state_tensors")
    plan.server_graph_result_bytes.value = graph.as_graph_def().SerializeToString()
    spec(phase.tensorflow_spec_result, names)
    phase.tensorflow_spec_result.target_node_names.append("save_server_state_tensors")
    phase.tensorflow_spec_result.output_tensor_specs.add(name=metric.name, dtype=1)
    phase.result_router.result_intermediate_state_input_filepath_tensor_name = f"{names[0]}:0"
    phase.result_router.result_aggregate_result_input_filepath_tensor_name = f"{names[1]}:0"
    phase.result_router.result_server_state_output_filepath_tensor_name = f"{names[2]}:0"
    for name, (shape, dtype) in UPDATE.items():
        one = phase.aggregations.add(intrinsic_uri="federated_sum")
        for to, leaf in (
            (one.intrinsic_args.add().input_tensor, name),
            (one.output_tensors.add(), f"intermediate_update/0/{name.partition('/')[2]}"),
        ):
            to.name, to.dtype = leaf, dtype.as_datatype_enum
            for size in shape:
                to.shape.dim.add(size=size)
    return plan


class PlainSession:
    """The reference's call sequences on a plan of the first form, one session, nothing of ours (artifacts.md 6.3)."""

    def __init__(self, plan, folder):
        self.plan, self.phase, self._file = plan, plan.phase[0].server_phase, str(Path(folder) / "file")
        definition = v1.GraphDef.FromString(plan.server_graph_bytes.value)
        self._graph = tf.Graph()
        with self._graph.as_default():
            tf.import_graph_def(definition, name="")
        self._session = v1.Session(graph=self._graph)

    def run(self, operation, feed=None):
        if operation:
            self._session.run(operation.partition(":")[0], feed)

    def restore(self, op, data):
        Path(self._file).write_bytes(data)
        feed = {op.saver_def.filename_tensor_name: self._file}
        self.run(op.before_restore_op, feed)
        self.run(op.saver_def.restore_op_name, feed)
        self.run(op.after_restore_op)

    def save(self, op):
        self.run(op.before_save_op)
        self.run(op.saver_def.save_tensor_name, {op.saver_def.filename_tensor_name: self._file})
        return Path(self._file).read_bytes()

    def partial(self, updates):
        self.run(self.phase.phase_init_op)
        for update in updates:
            self.restore(self.phase.read_update, write_checkpoint(update))
            self.run(self.phase.aggregate_into_accumulators_op)
        return self.save(self.phase.write_intermediate_update)

    def apply(self, state, partials):
        """The new server checkpoint, the client checkpoint, and the metrics as the graph has them."""
        self.restore(self.plan.server_savepoint, state)
        self.run(self.phase.phase_init_op)
        for partial in partials:
            self.restore(self.phase.read_intermediate_update, partial)
            self.run(self.phase.intermediate_aggregate_into_accumulators_op)
        self.run(self.phase.apply_aggregrated_updates_op)
        saved = self.save(self.plan.server_savepoint)
        metrics = {one.stat_name: self._session.run(one.variable_name) for one in self.phase.metrics}
        return saved, self.save(self.phase.write_client_init), metrics


class Graphs:
    one_graph = staticmethod(one_graph)
    two_graphs = staticmethod(two_graphs)
    initial_state = staticmethod(initial_state)
    update_of = staticmethod(update_of)
    plain_session = PlainSession
    weights = WEIGHTS


@pytest.fixture(scope="session")
def graphs():
    """What these tests make by hand: plans, states, updates."""
    return Graphs()


@pytest.fixture
def plain_session(tmp_path):
    """Makes plain sessions of plans."""
    return lambda plan: PlainSession(plan, tempfile.mkdtemp(dir=tmp_path))


@pytest.fixture(scope="session")
def reference():
    """Reads a file that the reference's builder made."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference's artifacts are not beside this checkout")
    return lambda name: (REFERENCE / name).read_bytes()
