import pytest
import tensorflow as tf

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import plan_pb2
from fedcompute.server.graph_plans.operations import check_operations
from fedcompute.server.graph_plans.session import load_graph

v1 = tf.compat.v1


def definition(build):
    with tf.Graph().as_default() as graph:
        build()
    return graph.as_graph_def()


def function(build):
    """A graph that only calls a function with the operation in it."""

    def inner():
        build()  # some operations give nothing that a function can return

    def outer():
        tf.function(inner, autograph=False).get_concrete_function()()

    return definition(outer)


def path(name="file"):
    return v1.placeholder(tf.string, [], name)


REFUSED = {
    "ReadFile": lambda: tf.io.read_file("/etc/passwd"),
    "WriteFile": lambda: tf.io.write_file("/tmp/x", "a"),
    "MatchingFiles": lambda: tf.io.matching_files("/*"),
    "EagerPyFunc": lambda: tf.py_function(lambda: 1, [], tf.int32),
    "PyFunc": lambda: v1.py_func(lambda: 1, [], tf.int32),
    "PrintV2": lambda: tf.raw_ops.PrintV2(input="a", output_stream="file:///tmp/x"),
    "TFRecordDataset": lambda: tf.data.TFRecordDataset("/etc/passwd")._variant_tensor,
    "SaveV2": lambda: tf.raw_ops.SaveV2(prefix="/tmp/x", tensor_names=["a"], shape_and_slices=[""], tensors=[1.0]),
    "HashTableV2": lambda: tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.string),
    "Abort": lambda: tf.raw_ops.Abort(),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", [definition, function], ids=["graph", "function"])
def test_an_operation_that_leads_outside_is_refused_by_name(name, place):
    with pytest.raises(ArtifactInvalid) as refused:
        check_operations(place(REFUSED[name]), set())
    assert refused.value.reason is Reason.PLAN_UNSUPPORTED
    assert name in refused.value.detail


def restore(prefix):
    return tf.raw_ops.RestoreV2(prefix=prefix, tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.float32])


def test_a_file_is_read_only_through_a_name_that_the_plan_gives():
    check_operations(definition(lambda: restore(path())), {"file"})
    check_operations(definition(lambda: restore(tf.identity(path()))), {"file"})
    check_operations(definition(lambda: restore(v1.placeholder_with_default(path(), []))), {"file"})
    for built in (
        lambda: restore("/etc/passwd"),
        lambda: restore(path("other")),
        lambda: restore(v1.placeholder_with_default("/etc/passwd", [], "other")),
        lambda: restore(tf.strings.join([path(), "/../../x"])),
    ):
        with pytest.raises(ArtifactInvalid) as refused:
            check_operations(definition(built), {"file"})
        assert refused.value.reason is Reason.PLAN_UNSUPPORTED


def test_a_file_is_never_read_within_a_function():
    built = function(lambda: restore("x"))
    with pytest.raises(ArtifactInvalid):
        check_operations(built, {"x"})


def test_a_function_cannot_lend_its_name_to_an_operation():
    built = definition(lambda: tf.identity(1))
    built.library.function.add().signature.name = "ReadFile"
    built.node.add(name="a", op="ReadFile")
    with pytest.raises(ArtifactInvalid):
        check_operations(built, set())


def test_computation_variables_control_flow_and_functions_are_allowed():
    def build():
        one = v1.get_variable("one", initializer=1.0, use_resource=True)
        looped = tf.while_loop(lambda x: x < 3, lambda x: x + 1, [one.read_value()])
        listed = tf.TensorArray(tf.float32, 2).unstack([1.0, 2.0]).stack()
        called = tf.function(lambda x: tf.cond(x > 1, lambda: x, lambda: -x), autograph=False)(one)
        drawn = tf.random.normal([2]) + tf.random.stateless_normal([2], [1, 2])
        return tf.group(looped, listed, called, drawn, tf.timestamp(), one.assign_add(1.0))

    check_operations(definition(build), set())


@pytest.mark.parametrize("name", ["plan.pb", "eval_plan.pb"])
def test_the_references_graphs_are_allowed(reference, name):
    graph = plan_pb2.Plan.FromString(reference(name)).server_graph_bytes.value
    savers = ("server", "client", "update", "intermediate_update", "aggregated_update")
    check_operations(v1.GraphDef.FromString(graph), {f"{one}_savepoint/Const" for one in savers})


def test_a_graph_that_names_another_machine_loads_on_this_one():
    built = definition(lambda: tf.identity(path(), name="a"))
    for node in built.node:
        node.device = "/job:elsewhere/task:7"
    assert load_graph(built.SerializeToString(), ("file:0",)).has("a")
