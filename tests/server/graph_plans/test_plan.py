import gc
import subprocess
import sys
import tempfile
import weakref

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason, UploadRejected
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.server.graph_plans.leaves import check_leaves
from fedcompute.server.graph_plans.plan import add_up, carries_graphs, kind_of, open_graph_plan, try_out
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

FORMS = ["one_graph", "two_graphs"]
TRAINING, EVALUATION = learning_pb2.LearningProcess.TRAINING, learning_pb2.LearningProcess.EVALUATION


@pytest.fixture(scope="module", params=FORMS)
def opened(request, graphs):
    """A plan of each form, opened."""
    return open_graph_plan(getattr(graphs, request.param)())


def total_of(plan, updates):
    named = {str(number): update for number, update in enumerate(updates)}
    return add_up(plan, list(named), named.__getitem__)


def random_update(plan, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=leaf.shape).astype(leaf.dtype) for name, leaf in plan.update_leaves.items()}


def test_a_round_moves_the_model_by_the_mean_of_its_updates(opened, graphs):
    updates, state = [graphs.update_of(seed) for seed in range(5)], graphs.initial_state()
    sums = [total_of(opened, updates[:2]), total_of(opened, updates[2:])]
    applied = opened.apply(write_checkpoint(state), [one.partial for one in sums], 5)
    new = read_checkpoint(applied.checkpoint)
    for index, name in enumerate(graphs.weights):
        mean = sum(update[f"update/2/{index}"] for update in updates) / 5
        np.testing.assert_allclose(new[name], state[name] - 0.5 * mean, rtol=1e-6)
    loss = sum(update["update/1/loss/0"] for update in updates) / 15
    assert applied.metrics == {"server/client_work/train/loss": pytest.approx(loss, rel=1e-6)}
    assert opened.metrics_of(applied.checkpoint) == applied.metrics
    told = read_checkpoint(opened.client_checkpoint(applied.checkpoint))
    assert {name: value.tolist() for name, value in told.items()} == {
        f"client/0/trainable/{index}": new[name].tolist() for index, name in enumerate(graphs.weights)
    }


def test_both_forms_of_a_plan_give_one_model(graphs):
    updates, state = [graphs.update_of(seed) for seed in range(7)], write_checkpoint(graphs.initial_state())
    results = []
    for form in FORMS:
        plan = open_graph_plan(getattr(graphs, form)())
        results.append(plan.apply(state, [total_of(plan, updates).partial], 7))
    assert results[0].metrics == results[1].metrics
    assert results[0].checkpoint == results[1].checkpoint


@pytest.mark.parametrize("name", ["plan.pb", "eval_plan.pb"])
def test_a_plan_of_the_reference_gives_the_bytes_of_a_plain_session(reference, plain_session, name):
    message = plan_pb2.Plan.FromString(reference(name))
    plan, plain = open_graph_plan(message), plain_session(message)
    # Without noise: the graph draws it from a generator that nothing here can seed.
    leaves = dict(read_checkpoint(reference("initial_state.server.ckp")))
    leaves["server/aggregator/query_state/numerator_state/stddev"] = np.array(0, np.float32)
    state = write_checkpoint(leaves)
    batches = [[random_update(plan, seed) for seed in some] for some in (range(3), range(3, 8))]
    partials = [total_of(plan, some).partial for some in batches]
    assert partials == [plain.partial(some) for some in batches]
    applied = plan.apply(state, partials, 8)
    saved, told, metrics = plain.apply(state, partials)
    assert (applied.checkpoint, plan.client_checkpoint(saved)) == (saved, told)
    assert applied.metrics == {name: float(value) for name, value in metrics.items()}


def test_partial_sums_of_three_and_five_devices_are_applied_as_eight(opened, graphs):
    updates, state = [graphs.update_of(seed) for seed in range(8)], write_checkpoint(graphs.initial_state())
    split = [total_of(opened, updates[:3]).partial, total_of(opened, updates[3:]).partial]
    model = [opened.apply(state, some, 8) for some in (split, [total_of(opened, updates).partial])]
    for name in graphs.weights:
        new = [read_checkpoint(one.checkpoint)[name] for one in model]
        np.testing.assert_allclose(new[0], new[1], atol=1e-6)


def damaged(update, kind):
    match kind:
        case "missing":
            return {name: value for name, value in update.items() if name != "update/2/1"}
        case "unknown":
            return {**update, "update/3": np.array(1, np.float32)}
        case "shape":
            return {**update, "update/2/1": np.zeros(3, np.float32)}
        case "dtype":
            return {**update, "update/0": np.array(1, np.int64)}
        case "nan":
            return {**update, "update/2/1": np.array([1, np.nan], np.float32)}
        case "huge":
            return {**update, "update/2/1": np.array([1, -3e38], np.float32)}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", Reason.WRONG_LEAF_NAMES),
        ("unknown", Reason.WRONG_LEAF_NAMES),
        ("shape", Reason.WRONG_LEAF_SHAPE),
        ("dtype", Reason.WRONG_LEAF_TYPE),
        ("nan", Reason.NOT_FINITE),
        ("huge", Reason.NOT_FINITE),
    ],
)
def test_a_bad_update_is_left_out_alone(opened, graphs, kind, reason):
    good = [graphs.update_of(seed) for seed in range(2)]
    total = total_of(opened, [good[0], damaged(graphs.update_of(9), kind), good[1]])
    assert total.num_inputs == 2
    assert {one: error.reason for one, error in total.refused.items()} == {"1": reason}
    assert total.partial == total_of(opened, good).partial


def test_an_update_that_cannot_be_read_is_left_out_alone(opened, graphs):
    def fetch(session_id):
        if session_id == "b":
            raise UploadRejected(Reason.DECRYPTION_FAILED, "no")
        return graphs.update_of(1)

    total = add_up(opened, ["a", "b", "c"], fetch)
    assert (total.num_inputs, list(total.refused)) == (2, ["b"])


def test_an_update_that_the_graph_refuses_halfway_leaves_nothing_in_the_sum(graphs):
    def only_one(update):
        return tf.debugging.Assert(tf.equal(update["update/0"], 1), [update["update/0"]])

    # The weights are added whether or not the number of devices is accepted.
    plan = open_graph_plan(graphs.one_graph(before_sum=only_one))
    good = [graphs.update_of(seed) for seed in range(3)]
    bad = {**graphs.update_of(9), "update/0": np.array(7, np.int32)}
    total = total_of(plan, [good[0], bad, good[1], bad, good[2]])
    assert {one: error.reason for one, error in total.refused.items()} == dict.fromkeys("13", Reason.GRAPH_FAILED)
    assert total.num_inputs == 3
    assert total.partial == total_of(plan, good).partial
    # What TensorFlow says of a failed assertion quotes the values.
    assert all("7" not in error.detail for error in total.refused.values())


def test_one_update_at_a_time_is_in_memory(opened, graphs):
    alive = []

    def fetch(session_id):
        gc.collect()
        assert not any(one() is not None for one in alive)
        update = graphs.update_of(int(session_id))
        alive[:] = [weakref.ref(value) for value in update.values()]
        return update

    assert add_up(opened, [str(number) for number in range(5)], fetch).num_inputs == 5


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_with_updates_of_over_500_mib_is_refused(graphs, form):
    plan = getattr(graphs, form)()
    if form == "one_graph":
        definition = tf.compat.v1.GraphDef.FromString(plan.server_graph_bytes.value)
        node = next(one for one in definition.node if one.op == "VarHandleOp" and one.name == "update/2/0")
        node.attr["shape"].shape.dim[0].size = 1 << 40
        plan.server_graph_bytes.value = definition.SerializeToString()
    else:
        leaf = plan.phase[0].server_phase_v2.aggregations[3]
        for one in (leaf.intrinsic_args[0].input_tensor, leaf.output_tensors[0]):
            one.shape.dim[0].size = 1 << 40
    with pytest.raises(ArtifactInvalid) as refused:
        open_graph_plan(plan)
    assert refused.value.reason in (Reason.CHECKPOINT_TOO_LARGE, Reason.PLAN_MALFORMED)


def test_a_plan_whose_graph_takes_no_update_at_all_is_found_out_at_once(graphs):
    def never(update):
        return tf.debugging.Assert(tf.less(update["update/0"], -1), [update["update/0"]])

    with pytest.raises(ArtifactInvalid) as refused:
        try_out(open_graph_plan(graphs.one_graph(before_sum=never)))
    assert refused.value.reason is Reason.PLAN_UNSUPPORTED


def test_trying_a_plan_out_finds_no_fault_in_a_good_one(opened):
    try_out(opened)


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_gives_metrics_and_leaves_the_state(graphs, form):
    plan = open_graph_plan(getattr(graphs, form)("EVALUATION"))
    state = graphs.initial_state()
    # A training checkpoint has leaves of its own metrics.
    stored = write_checkpoint({**state, "metrics/client_work/train/loss": np.array(1, np.float32)})
    applied = plan.apply(stored, [total_of(plan, [graphs.update_of(0)]).partial], 1)
    assert list(applied.metrics) == ["server/eval/loss"]
    new = read_checkpoint(applied.checkpoint)
    assert all((new[name] == value).all() for name, value in state.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_kind_of_a_plan_is_told_by_its_metrics(graphs, form):
    for kind, expected in (("TRAINING", TRAINING), ("EVALUATION", EVALUATION)):
        assert kind_of(getattr(graphs, form)(kind)) == expected


def test_the_references_mislabelled_plans_are_told_by_their_content(reference):
    for name, expected in (("plan.pb", TRAINING), ("eval_plan.pb", EVALUATION)):
        plan = plan_pb2.Plan.FromString(reference(name))
        assert (carries_graphs(plan), kind_of(plan)) == (True, expected)


def test_a_plan_with_a_learning_process_carries_no_graphs():
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=learning_pb2.LearningProcess(version=1))
    plan.phase[0].server_phase_v2.name = "ours lists its aggregations too"
    assert not carries_graphs(plan)


def test_the_second_form_wins_where_a_plan_carries_both(graphs):
    plan = graphs.two_graphs()
    plan.phase[0].server_phase.CopyFrom(graphs.one_graph().phase[0].server_phase)
    total = total_of(open_graph_plan(plan), [graphs.update_of(0)])
    assert total.partial[:1] == b"\n"  # a protobuf; a checkpoint begins with two zeros


def test_a_state_of_another_model_is_refused(opened, graphs):
    state = graphs.initial_state()
    del state["server/finalizer/learning_rate"]
    with pytest.raises(ArtifactInvalid) as refused:
        opened.client_checkpoint(write_checkpoint(state))
    assert refused.value.reason is Reason.STATE_MISMATCH


def test_a_damaged_partial_sum_is_told_from_one_of_another_plan(opened, graphs):
    state, partial = write_checkpoint(graphs.initial_state()), total_of(opened, [graphs.update_of(0)]).partial
    for given, reason in ((partial[:-9], "PARTIAL_SUM_MALFORMED"), (write_checkpoint({}), "PARTIAL_SUM_MISMATCH")):
        with pytest.raises(ArtifactInvalid) as refused:
            opened.apply(state, [given], 1)
        assert refused.value.reason.name in (reason, "PARTIAL_SUM_MALFORMED")


def test_a_leaf_of_over_500_mib_is_refused():
    # Its elements are one number in memory.
    leaf = np.broadcast_to(np.float32(0), (131_072_001,))
    with pytest.raises(ArtifactInvalid) as refused:
        check_leaves({"a": leaf}, {"a": LeafSpec("a", (-1,), np.dtype(np.float32))}, Reason.STATE_MISMATCH)
    assert refused.value.reason is Reason.CHECKPOINT_TOO_LARGE


def test_metrics_that_a_graph_does_not_save_are_released_with_the_checkpoint(graphs):
    plan = graphs.one_graph()
    # As it was before metrics went into checkpoints.
    plan.phase[0].server_phase.metrics[0].stat_name = "server/loss"
    opened = open_graph_plan(plan)
    state, total = write_checkpoint(graphs.initial_state()), total_of(opened, [graphs.update_of(0)])
    applied = opened.apply(state, [total.partial], 1)
    assert opened.metrics_of(applied.checkpoint) == applied.metrics


def test_no_file_stays_behind(opened, graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    state = write_checkpoint(graphs.initial_state())
    opened.apply(state, [total_of(opened, [graphs.update_of(0)]).partial], 1)
    with pytest.raises(ArtifactInvalid):
        opened.client_checkpoint(write_checkpoint({}))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files_is_the_storages_fault(graphs, tmp_path, monkeypatch):
    plan = open_graph_plan(graphs.one_graph())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OperationFailed) as failed:
        total_of(plan, [graphs.update_of(0)])
    assert failed.value.reason is Reason.STORAGE_FAILED


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a file's size are Linux's here")
def test_a_disk_that_is_full_is_the_storages_fault(reference, tmp_path):
    (tmp_path / "plan").write_bytes(reference("plan.pb"))
    script = """
import resource, signal, sys
from fedcompute.errors import FedComputeError
from fedcompute.protos import plan_pb2
from fedcompute.server.graph_plans.plan import open_graph_plan
plan = open_graph_plan(plan_pb2.Plan.FromString(open(sys.argv[1], "rb").read()))
with plan.accumulator() as total:
    # No write may go beyond this, as on a disk without space.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
    try:
        total.partial()
    except FedComputeError as error:
        print(error.reason.value)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "plan")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "storage_failed"


def test_without_tensorflow_the_error_says_what_to_install(graphs, tmp_path):
    (tmp_path / "plan").write_bytes(graphs.one_graph().SerializeToString())
    script = """
import sys
sys.modules["tensorflow"] = None
from fedcompute.errors import ArtifactInvalid
from fedcompute.protos import plan_pb2
from fedcompute.server.graph_plans.plan import open_graph_plan
try:
    open_graph_plan(plan_pb2.Plan.FromString(open(sys.argv[1], "rb").read()))
except ArtifactInvalid as error:
    print(error.reason.value, error.remedy)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "plan")], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("plan_unsupported")
    assert "fedcompute[tensorflow]" in done.stdout


def broken(plan, kind):
    phase = plan.phase[0]
    match kind:
        case "no graph":
            plan.server_graph_bytes.value = b"\xff"
        case "unknown operation":
            phase.server_phase.apply_aggregrated_updates_op = "nothing"
        case "no operation":
            phase.server_phase.phase_init_op = ""
        case "another checkpoint format":
            plan.server_savepoint.saver_def.version = 2
        case "secure aggregation":
            phase.server_phase.read_update.side_channel_tensors["a"].restore_name = "b"


@pytest.mark.parametrize(
    "kind", ["no graph", "unknown operation", "no operation", "another checkpoint format", "secure aggregation"]
)
def test_a_plan_of_the_first_form_whose_parts_do_not_fit_is_refused(graphs, kind):
    plan = graphs.one_graph()
    broken(plan, kind)
    with pytest.raises(ArtifactInvalid) as refused:
        open_graph_plan(plan)
    assert refused.value.reason in (Reason.PLAN_MALFORMED, Reason.PLAN_UNSUPPORTED)


def broken_second(plan, kind):
    phase = plan.phase[0].server_phase_v2
    match kind:
        case "no router":
            phase.ClearField("prepare_router")
        case "no graph":
            plan.server_graph_result_bytes.value = b""
        case "another input":
            phase.tensorflow_spec_result.input_tensor_specs[0].name = "other:0"
        case "no target":
            del phase.tensorflow_spec_prepare.target_node_names[:]
        case "an output of prepare":
            phase.tensorflow_spec_prepare.output_tensor_specs.add(name="a:0")
        case "an unknown output":
            phase.tensorflow_spec_result.output_tensor_specs.add(name="a:0")
        case "no aggregation":
            del phase.aggregations[:]


@pytest.mark.parametrize(
    "kind",
    [
        "no router", "no graph", "another input", "no target", "an output of prepare", "an unknown output",
        "no aggregation",
    ],
)  # fmt: skip
def test_a_plan_of_the_second_form_whose_parts_do_not_fit_is_refused(graphs, kind):
    plan = graphs.two_graphs()
    broken_second(plan, kind)
    with pytest.raises(ArtifactInvalid) as refused:
        open_graph_plan(plan)
    assert refused.value.reason in (Reason.PLAN_MALFORMED, Reason.PLAN_UNSUPPORTED)
