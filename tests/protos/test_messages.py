import subprocess
import sys
from pathlib import Path

import pytest

from fedcompute.protos import federatedcompute_pb2, plan_pb2, task_assignments_pb2, task_builder_pb2, task_pb2

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "reference-keras" / "output"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference's artifacts are not beside this clone")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        (federatedcompute_pb2.Resource, "compression_format", 999),
        (federatedcompute_pb2.RejectionInfo, "reason", 1001),
        (federatedcompute_pb2.RejectionInfo, "retry_window", 1002),
        (federatedcompute_pb2.RejectionInfo, "auth_metadata", 1003),
        (plan_pb2.TensorflowSpec, "example_selector", 999),
        (plan_pb2.Plan, "learning_process", 2001),
        (plan_pb2.Plan, "client_tflite_graph_bytes", 12),
        (plan_pb2.ClientOnlyPlan, "tflite_graph", 5),
        (plan_pb2.ServerPhase, "apply_aggregrated_updates_op", 5),
        (task_assignments_pb2.TaskAssignment, "example_selector", 11),
        (task_builder_pb2.DifferentialPrivacy, "estimated_population", 1001),
        (task_builder_pb2.Evaluation, "source_training_task_id", 8),
        (task_pb2.Task, "info", 20),
    ],
)
def test_field_numbers_are_those_of_the_wire(message, field, number):
    assert message.DESCRIPTOR.fields_by_name[field].number == number


@pytest.mark.parametrize(
    ("message", "package"),
    [
        (federatedcompute_pb2.Resource, "google.internal.federatedcompute.v1"),
        (task_pb2.Task, "google.ondevicepersonalization.federatedcompute.proto"),
        (plan_pb2.Plan, "google.internal.federated.plan"),
    ],
)
def test_packages_are_those_of_the_wire(message, package):
    assert message.DESCRIPTOR.file.package == package


def test_a_sub_second_retry_window_and_the_gzip_format_have_the_bytes_of_the_wire():
    rejection = federatedcompute_pb2.RejectionInfo(reason=federatedcompute_pb2.RejectionReason.NO_TASK_AVAILABLE)
    rejection.retry_window.delay_min.FromMilliseconds(200)
    # Field 1001 varint: tag 0xc8 0x3e; field 1002 message: tag 0xd2 0x3e.
    assert rejection.SerializeToString() == bytes.fromhex("c83e01" + "d23e07" + "0a05" + "108084af5f")
    resource = federatedcompute_pb2.Resource(compression_format=1)
    assert resource.SerializeToString() == bytes.fromhex("b83e01")


@needs_fixtures
@pytest.mark.parametrize("name", ["plan.pb", "eval_plan.pb"])
def test_server_plans_of_the_reference_survive_parsing_byte_for_byte(name):
    data = (FIXTURES / name).read_bytes()
    plan = plan_pb2.Plan.FromString(data)
    assert plan_pb2.Plan.FromString(plan.SerializeToString()) == plan
    assert len(plan.SerializeToString()) == len(data)
    assert plan.version == 1
    assert plan.phase[0].server_phase.name or plan.phase[0].server_phase.metrics
    assert plan.phase[0].client_phase.tensorflow_spec.HasField("example_selector")


@needs_fixtures
def test_unknown_fields_of_a_plan_survive():
    data = (FIXTURES / "client_only_plan.pb").read_bytes() + bytes.fromhex("f2fa0103616263")
    assert plan_pb2.ClientOnlyPlan.FromString(data).SerializeToString().endswith(bytes.fromhex("f2fa0103616263"))


def test_messages_parse_without_tensorflow_and_load_beside_it():
    without = (
        "import sys, fedcompute.protos.plan_pb2; assert not any(m.split('.')[0] == 'tensorflow' for m in sys.modules)"
    )
    beside = (
        "import fedcompute.protos.tensorflow_pb2 as ours, tensorflow as tf;"
        "example = ours.Example(); example.features.feature['x'].int64_list.value.append(7);"
        "theirs = tf.train.Example.FromString(example.SerializeToString());"
        "assert theirs.features.feature['x'].int64_list.value[0] == 7"
    )
    for script in (without, beside):
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_generated_code_is_fresh():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate_protos.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
