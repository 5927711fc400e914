"""What a client plan must say of itself, checked without its graph or TensorFlow (spec/device.md 5.2 to 5.6)."""

from collections.abc import Mapping

from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2

_DATA_TYPES = plan_pb2.ExampleQuerySpec.OutputVectorSpec


def validate(plan: plan_pb2.ClientOnlyPlan) -> None:
    """Checks a plan that trains, evaluates or answers example queries.

    Raises DeviceRunFailed: PLAN_UNSUPPORTED if it does neither, PLAN_ARGUMENT_INVALID if its parts do not fit.
    """
    match plan.phase.WhichOneof("spec"):
        case "tensorflow_spec":
            _check_graph_plan(plan)
        case "example_query_spec":
            _check_queries(plan.phase)
        case _:
            raise DeviceRunFailed(Reason.PLAN_UNSUPPORTED, "a plan without a computation")


def _check_graph_plan(plan: plan_pb2.ClientOnlyPlan) -> None:
    if not plan.tflite_graph:
        raise DeviceRunFailed(Reason.PLAN_UNSUPPORTED, "a training plan without a TFLite graph")
    _check_router(plan.phase, "federated_compute")
    spec, router = plan.phase.tensorflow_spec, plan.phase.federated_compute
    _check_aggregations([output.name for output in spec.output_tensor_specs], router.aggregations, "secure_aggregation")
    routed = [name for name in (router.input_filepath_tensor_name, router.output_filepath_tensor_name) if name]
    if sorted(routed) != sorted(tensor.name for tensor in spec.input_tensor_specs):
        raise _invalid(f"the inputs differ from the routed files {routed}")
    if spec.constant_inputs:
        raise _invalid("constant inputs are not accepted")


def _check_queries(phase: plan_pb2.ClientPhase) -> None:
    _check_router(phase, "federated_example_query")
    specs = [item for query in phase.example_query_spec.example_queries for item in query.output_vector_specs.items()]
    names = [name for name, _ in specs]
    if not names:
        raise _invalid("the plan's queries have no outputs")
    if len(set(names)) != len(names):
        raise _invalid(f"{len(names)} outputs have {len(set(names))} names")
    _check_aggregations(names, phase.federated_example_query.aggregations, "tf_v1_checkpoint_aggregation")
    for name, spec in specs:
        if spec.data_type == _DATA_TYPES.UNSPECIFIED or spec.data_type not in _DATA_TYPES.DataType.values():
            raise _invalid(f"output {name} has data type {spec.data_type}, which is none")


def _check_router(phase: plan_pb2.ClientPhase, name: str) -> None:
    if phase.WhichOneof("io_router") != name:
        raise _invalid(f"the plan has no {name} router")


def _check_aggregations(
    outputs: list[str], aggregations: Mapping[str, plan_pb2.AggregationConfig], wanted: str
) -> None:
    for name in outputs:
        # Looking up a name that is missing would add it to the plan.
        if name not in aggregations or aggregations[name].WhichOneof("protocol_config") != wanted:
            raise _invalid(f"output {name} has no {wanted}")


def _invalid(detail: str) -> DeviceRunFailed:
    return DeviceRunFailed(Reason.PLAN_ARGUMENT_INVALID, detail)
