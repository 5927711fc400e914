import numpy as np
import pytest

from fedcompute.builder.build import build_task_group
from fedcompute.builder.client_graph import INPUT_NAME, OUTPUT_NAME, TARGET_NAME, TOKEN_NAME
from fedcompute.builder.config import read_config
from fedcompute.builder.op_check import flex_ops, supported_ops
from fedcompute.errors import ArtifactInvalid, BuildFailed, ConfigInvalid, Reason
from fedcompute.learning.plans import read_plan
from fedcompute.privacy.accounting import poisson_epsilon
from fedcompute.privacy.banded import optimal_coefficients
from fedcompute.protos import learning_pb2, plan_pb2, task_builder_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

Flags = task_builder_pb2.ExperimentFlags


@pytest.fixture
def reference_config(reference):
    config = read_config((reference / "input/keras_task_config.pbtxt").read_bytes()).config
    # Calibration, which the file asks for, takes half a minute.
    config.differential_privacy.noise_multiplier = 1.0
    return config


@pytest.fixture
def reference_group(reference, reference_config):
    return build_task_group(reference / "input/keras_model", reference_config, Flags(skip_dp_check=True))


def graph_inputs(flatbuffer: bytes):
    from tensorflow.lite.python import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(flatbuffer)
    graph = model.subgraphs[0]
    tensors = [(graph.tensors[i].name, graph.tensors[i].type, list(graph.tensors[i].shape)) for i in graph.inputs]
    metadata = [entry.name for entry in model.metadata]
    return tensors, list(graph.outputs), flatbuffer[4:8], model.version, model.description, metadata


@pytest.mark.parametrize(
    ("kind", "plan_name", "client_name"),
    [("training", "plan.pb", "client_only_plan.pb"), ("evaluation", "eval_plan.pb", "eval_client_only_plan.pb")],
)
def test_the_reference_model_gives_plans_of_the_reference_form(
    reference, reference_group, kind, plan_name, client_name
):
    built = getattr(reference_group, kind)
    theirs = plan_pb2.Plan.FromString((reference / "output" / plan_name).read_bytes())
    ours = read_plan(built.plan)
    assert ours.version == theirs.version == 1
    assert len(ours.phase) == 1
    assert ours.phase[0].client_phase == theirs.phase[0].client_phase
    assert ours.phase[0].client_phase.tensorflow_spec.HasField("example_selector")
    assert graph_inputs(ours.client_tflite_graph_bytes) == graph_inputs(theirs.client_tflite_graph_bytes)
    client = plan_pb2.ClientOnlyPlan.FromString(built.client_plan)
    theirs_client = plan_pb2.ClientOnlyPlan.FromString((reference / "output" / client_name).read_bytes())
    assert client.phase == theirs_client.phase
    assert client.tflite_graph == ours.client_tflite_graph_bytes
    assert (client.graph, ours.client_graph_bytes.value) == (b"", b"")


@pytest.mark.parametrize(
    ("kind", "client_name", "model_leaf"),
    [
        ("training", "client_only_plan.pb", "client/0/trainable/{}"),
        ("evaluation", "eval_client_only_plan.pb", "client/0/0/{}"),
    ],
)
def test_our_plan_and_the_reference_plan_compute_the_same_update(
    reference, reference_group, example, kind, client_name, model_leaf
):
    from fedcompute.device.plans.plan_runner import PlanRunner

    state = read_checkpoint(reference_group.training.checkpoint)
    received = {model_leaf.format(i): state[f"server/global_model_weights/trainable/{i}"] for i in range(4)}
    if kind == "training":
        received["client/1"] = np.array(0.1, np.float32)
    rng = np.random.default_rng(0)
    examples = [example(x=rng.random(784), y=rng.integers(0, 2, 1)) for _ in range(50)]
    plans = (getattr(reference_group, kind).client_plan, (reference / "output" / client_name).read_bytes())
    runner = PlanRunner()
    try:
        ours, theirs = (
            read_checkpoint(
                runner.run(plan_pb2.ClientOnlyPlan.FromString(plan), write_checkpoint(received), examples).update
            )
            for plan in plans
        )
    finally:
        runner.close()
    assert list(ours) == list(theirs)
    for name, leaf in theirs.items():
        np.testing.assert_allclose(ours[name], leaf, atol=1e-6, err_msg=name)


def test_every_flex_op_of_the_reference_model_is_on_the_list(reference_group):
    for built in (reference_group.training, reference_group.evaluation):
        ops = flex_ops(plan_pb2.ClientOnlyPlan.FromString(built.client_plan).tflite_graph)
        assert ops.keys() <= supported_ops().keys()
    assert reference_group.training.task.min_client_version == "341912000"
    assert reference_group.evaluation.task.min_client_version == "341812000"


def test_the_initial_checkpoints_hold_the_reference_state(reference, reference_config, reference_group):
    theirs = read_checkpoint((reference / "output/initial_state.server.ckp").read_bytes())
    ours = read_checkpoint(reference_group.training.checkpoint)
    assert [(n, a.shape, a.dtype) for n, a in ours.items()] == [(n, a.shape, a.dtype) for n, a in theirs.items()]
    noise = {"server/aggregator/dp_event/noise_multiplier", "server/aggregator/query_state/numerator_state/stddev"}
    assert {name for name in ours if (ours[name] != theirs[name]).any()} == noise
    zeros = (reference / "output/eval_initial_state.server.ckp").read_bytes()
    assert reference_group.evaluation.checkpoint == zeros


def test_a_group_shares_its_correlation_id_and_its_state(config, dense_model):
    group = build_task_group(dense_model, config)
    assert group.training.task.correlation_id == group.evaluation.task.correlation_id != ""
    assert read_checkpoint(group.training.checkpoint).keys() == read_checkpoint(group.evaluation.checkpoint).keys()


@pytest.mark.parametrize(("mode", "kinds"), [("TRAINING_ONLY", (True, False)), ("EVAL_ONLY", (False, True))])
def test_the_mode_decides_which_tasks_are_built(config, dense_model, mode, kinds):
    config.mode = task_builder_pb2.TaskMode.Enum.Value(mode)
    group = build_task_group(dense_model, config)
    assert (group.training is not None, group.evaluation is not None) == kinds


def test_leaf_names_are_those_of_the_configuration(config, dense_model):
    def names(flags):
        group = build_task_group(dense_model, config, flags)
        process = read_plan(group.training.plan).learning_process
        evaluation = read_plan(group.evaluation.plan).learning_process
        return [[leaf.client_name for leaf in process.broadcasts], [leaf.spec.name for leaf in process.updates]], [
            [leaf.client_name for leaf in evaluation.broadcasts],
            [leaf.spec.name for leaf in evaluation.updates],
        ]

    trainable = [f"client/0/trainable/{i}" for i in range(4)]
    metrics = ["sparse_categorical_accuracy/0", "sparse_categorical_accuracy/1", "loss/0", "loss/1"]
    private, evaluated = names(Flags())
    assert private[0] == [*trainable, "client/1"]
    assert private[1] == [*(f"update/0/{m}" for m in metrics), *(f"update/1/{i}" for i in range(4))]
    assert evaluated == [[f"client/0/0/{i}" for i in range(4)], [f"update/0/{m}" for m in metrics]]
    plain, _ = names(Flags(skip_dp_aggregator=True))
    assert plain[0] == trainable
    assert plain[1] == ["update/0", *(f"update/1/{m}" for m in metrics), *(f"update/2/{i}" for i in range(4))]


def test_selectors_are_those_of_training_and_evaluation(config, dense_model):
    group = build_task_group(dense_model, config)
    for built, uri in ((group.training, "app://digits/train"), (group.evaluation, "app://digits/eval")):
        plan = plan_pb2.ClientOnlyPlan.FromString(built.client_plan)
        assert plan.phase.tensorflow_spec.example_selector.collection_uri == uri
        assert uri.encode() in plan.tflite_graph


def test_the_report_says_what_was_built(config, dense_model):
    config.federated_learning.learning_process.metrics.add(name="sparse_categorical_acc")
    report = build_task_group(dense_model, config, Flags(skip_dp_check=True)).report
    applied = report.applied_algorithms
    assert (applied.learning_algo, applied.client_optimizer, applied.server_optimizer) == (1, 1, 2)
    assert applied.dp_aggregator == task_builder_pb2.DpAggregator.FIXED_GAUSSIAN
    assert report.metric_results.accepted_metrics == "sparse_categorical_accuracy"
    assert report.metric_results.rejected_metrics == "sparse_categorical_acc"
    assert (report.dp_hyperparameters.noise_multiplier, report.dp_hyperparameters.num_training_rounds) == (1.0, 20)
    assert any("did you mean 'sparse_categorical_accuracy'" in warning for warning in report.warnings)
    assert any("skip_dp_check" in warning for warning in report.warnings)


def test_without_an_aggregator_the_report_names_none_and_says_so(config, dense_model):
    report = build_task_group(dense_model, config, Flags(skip_dp_aggregator=True)).report
    assert report.applied_algorithms.dp_aggregator == task_builder_pb2.DpAggregator.UNKNOWN
    assert any("adds no noise" in warning for warning in report.warnings)


def test_a_type_of_aggregation_that_is_not_offered_is_refused_by_name(config, dense_model):
    config.differential_privacy.type = 9
    with pytest.raises(ConfigInvalid, match=r"`type` has a bad value: `9` in `differential_privacy`.*or BANDED_MF"):
        build_task_group(dense_model, config)


def processes(group):
    return [read_plan(built.plan).learning_process for built in (group.training, group.evaluation)]


@pytest.mark.parametrize(
    "name", ["FIXED_GAUSSIAN", "ADAPTIVE_GAUSSIAN", "TREE_AGGREGATION", "ADAPTIVE_TREE", "BANDED_MF"]
)
def test_plans_carry_the_promise_and_its_epsilon_is_that_of_the_report(config, dense_model, name):
    config.differential_privacy.type = task_builder_pb2.DpAggregator.Enum.Value(name)
    group = build_task_group(dense_model, config, Flags(skip_dp_check=True))
    training, evaluation = processes(group)
    claim = training.privacy_claim
    assert (claim.estimated_population, claim.minimum_separation, claim.delta, claim.rounds) == (10**6, 3, 1e-6, 20)
    kind = learning_pb2.PrivacyClaim.Participation.Name(claim.participation)
    assert kind == ("MIN_SEPARATION" if name == "BANDED_MF" else "POISSON")
    assert np.float32(claim.epsilon) == np.float32(group.report.dp_hyperparameters.dp_epsilon)
    assert not training.HasField("metric_noise")
    # Nothing makes a device stay away from an evaluation, whose metrics are outside epsilon.
    claim.minimum_separation, claim.epsilon = 0, 0
    assert claim == evaluation.privacy_claim


def test_a_build_without_an_aggregator_promises_nothing(config, dense_model):
    config.differential_privacy.metrics_clip_norm = config.differential_privacy.metrics_noise_multiplier = 5
    for process in processes(build_task_group(dense_model, config, Flags(skip_dp_aggregator=True))):
        assert not process.HasField("privacy_claim")
        assert not process.HasField("metric_noise")


def test_noise_on_metrics_is_in_both_plans(config, dense_model):
    config.differential_privacy.metrics_clip_norm = 20
    config.differential_privacy.metrics_noise_multiplier = 5
    group = build_task_group(dense_model, config)
    for process in processes(group):
        assert process.metric_noise == learning_pb2.MetricNoise(clip_norm=20, noise_multiplier=5)
    _, evaluation = processes(group)
    assert evaluation.privacy_claim.epsilon == pytest.approx(poisson_epsilon(5, 20, 4e-6, 1e-6), rel=1e-2)
    assert any("20 rounds of evaluation release noised metrics: with the training" in w for w in group.report.warnings)


def test_a_banded_plan_has_a_band_for_each_round_of_separation_and_the_report_says_so(config, dense_model):
    config.differential_privacy.type = task_builder_pb2.DpAggregator.BANDED_MF
    group = build_task_group(dense_model, config, Flags(skip_dp_check=True))
    training, _ = processes(group)
    assert training.banded_mf.coefficients == list(optimal_coefficients(20, 3))
    assert (training.banded_mf.clip_norm, training.banded_mf.noise_multiplier) == (0.25, 1)
    assert training.banded_mf.report_goal == 50
    assert any("correlated over 3 rounds" in warning for warning in group.report.warnings)


def test_an_initial_checkpoint_holds_no_noise(config, dense_model):
    config.differential_privacy.type = task_builder_pb2.DpAggregator.TREE_AGGREGATION
    checkpoints = [build_task_group(dense_model, config, Flags(skip_dp_check=True)).training.checkpoint for _ in "ab"]
    assert checkpoints[0] == checkpoints[1]


@pytest.mark.parametrize(
    ("field", "number", "value"),
    [("type", 9, "9"), ("client_optimizer", 9, "9"), ("server_optimizer", 9, "9")],
)
def test_a_value_that_is_not_offered_is_refused_by_field(config, dense_model, field, number, value):
    setattr(config.federated_learning.learning_process, field, number)
    with pytest.raises(ConfigInvalid) as caught:
        build_task_group(dense_model, config)
    assert f"key `{field}` has a bad value: `{value}` in `learning_process`" in caught.value.detail


def test_an_operation_that_no_device_has_is_refused_by_name_and_builds_without_the_check(config, refused_model):
    with pytest.raises(BuildFailed) as caught:
        build_task_group(refused_model, config)
    assert caught.value.reason == Reason.OPS_NOT_SUPPORTED
    assert "Please contact Google to register these ops: {'ResizeBilinearGrad': 'Resize" in caught.value.detail
    group = build_task_group(refused_model, config, Flags(skip_flex_ops_check=True))
    assert group.training.task.min_client_version == "0"


def test_a_directory_that_is_no_model_is_refused(config, tmp_path):
    with pytest.raises(ArtifactInvalid) as caught:
        build_task_group(tmp_path, config)
    assert caught.value.reason == Reason.SAVED_MODEL_INVALID


def test_a_metric_that_does_not_fit_is_named(config, dense_model):
    config.federated_learning.learning_process.metrics[0].name = "binary_accuracy"
    with pytest.raises(ArtifactInvalid, match="binary_accuracy"):
        build_task_group(dense_model, config)


def test_the_report_is_filled_as_far_as_a_failed_build_got(config, refused_model):
    report = task_builder_pb2.TaskReport()
    with pytest.raises(BuildFailed):
        build_task_group(refused_model, config, report=report)
    assert report.dp_hyperparameters.num_training_rounds == 20
    assert report.metric_results.accepted_metrics == "sparse_categorical_accuracy"


def test_the_graph_keeps_its_fixed_names():
    assert (TOKEN_NAME, INPUT_NAME, OUTPUT_NAME, TARGET_NAME) == (
        "data_token",
        "input_filepath",
        "output_filepath",
        "save_client_update_tensors",
    )
