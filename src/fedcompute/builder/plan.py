"""Plans: the server's and the device's half of a task, from their parts (spec/artifacts.md 2, 4)."""

from fedcompute.builder.client_graph import INPUT_NAME, OUTPUT_NAME, TARGET_NAME, TOKEN_NAME
from fedcompute.protos import learning_pb2, plan_pb2, tensorflow_pb2

PLAN_VERSION = 1


def build_plan(
    process: learning_pb2.LearningProcess, tflite_graph: bytes, selector: plan_pb2.ExampleSelector
) -> plan_pb2.Plan:
    """The server's plan: one phase with the client's half, and the server's half as data (field 2001)."""
    plan = plan_pb2.Plan(version=PLAN_VERSION, client_tflite_graph_bytes=tflite_graph)
    plan.phase.add().client_phase.CopyFrom(_client_phase(selector))
    plan.learning_process.CopyFrom(process)
    return plan


def client_only_plan(plan: plan_pb2.Plan) -> plan_pb2.ClientOnlyPlan:
    """What devices get of a plan; `graph` stays empty, as the wire has it after conversion."""
    return plan_pb2.ClientOnlyPlan(phase=plan.phase[0].client_phase, tflite_graph=plan.client_tflite_graph_bytes)


def example_selector(collection_uri: str) -> plan_pb2.ExampleSelector:
    """The selector of a configured URI; an empty but present message for none."""
    return plan_pb2.ExampleSelector(collection_uri=collection_uri)


def _client_phase(selector: plan_pb2.ExampleSelector) -> plan_pb2.ClientPhase:
    phase = plan_pb2.ClientPhase()
    spec = phase.tensorflow_spec
    spec.dataset_token_tensor_name = f"{TOKEN_NAME}:0"
    for name in (INPUT_NAME, OUTPUT_NAME):
        tensor = spec.input_tensor_specs.add(name=f"{name}:0", dtype=tensorflow_pb2.DT_STRING)
        tensor.shape.SetInParent()
    spec.target_node_names.append(TARGET_NAME)
    spec.example_selector.CopyFrom(selector)
    phase.federated_compute.input_filepath_tensor_name = f"{INPUT_NAME}:0"
    phase.federated_compute.output_filepath_tensor_name = f"{OUTPUT_NAME}:0"
    return phase
