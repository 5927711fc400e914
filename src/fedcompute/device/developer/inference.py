"""Models that a service runs itself, in `on_execute` (spec/device.md 7.9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fedcompute.device.developer.connection import Ask, Refused
from fedcompute.device.developer.errors import ErrorCode, IllegalState, OnDevicePersonalizationException
from fedcompute.device.developer.key_values import KeyValueStore


class ModelType(IntEnum):
    """The form of a model; the numbers are Android's. Only TensorFlow Lite runs here."""

    TENSORFLOW_LITE = 1
    EXECUTORCH = 2


@dataclass(frozen=True)
class InferenceParams:
    """Which model: the value of `model_key` in remote or local data. `threads`: at least 1."""

    store: KeyValueStore
    model_key: str
    model_type: ModelType = ModelType.TENSORFLOW_LITE
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.model_key or self.threads < 1:
            raise ValueError(f"model key {self.model_key!r}, {self.threads} threads; both must be there")


@dataclass(frozen=True)
class InferenceInput:
    """`inputs`: an array for each input of the model, in its order, [batch_size, ...]."""

    params: InferenceParams
    inputs: Sequence[Any]
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, not at least 1")


@dataclass(frozen=True)
class InferenceOutput:
    """`outputs`: NumPy arrays by the number of the model's output."""

    outputs: Mapping[int, Any]


class ModelManager:
    """Runs models in the service's own process, with the small runtime that phones have (extra `inference`)."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def run(self, request: InferenceInput) -> InferenceOutput:
        """The model's outputs.

        Raises OnDevicePersonalizationException: INFERENCE_MODEL_NOT_FOUND if the store has no such key,
        INFERENCE_FAILED for a model or inputs that do not run; IllegalState in an operation without models.
        """
        try:
            self._ask("models.allowed", (), None)
        except Refused as refused:
            raise IllegalState(refused.detail) from None
        params = request.params
        model = params.store.get(params.model_key)
        if model is None:
            raise OnDevicePersonalizationException(
                ErrorCode.INFERENCE_MODEL_NOT_FOUND, f"no model at the key {params.model_key!r}"
            )
        if params.model_type != ModelType.TENSORFLOW_LITE:
            raise OnDevicePersonalizationException(ErrorCode.INFERENCE_FAILED, f"models of type {params.model_type}")
        try:
            return InferenceOutput(_run(model, request))
        except (ImportError, ValueError, RuntimeError, TypeError, IndexError) as error:
            raise OnDevicePersonalizationException(ErrorCode.INFERENCE_FAILED, f"{error}") from error


def _run(model: bytes, request: InferenceInput) -> dict[int, Any]:
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model, num_threads=request.params.threads)
    inputs = interpreter.get_input_details()
    if len(inputs) != len(request.inputs):
        raise ValueError(f"{len(request.inputs)} inputs for a model that takes {len(inputs)}")
    for detail in inputs:
        shape = [request.batch_size, *detail["shape"][1:]]
        if list(detail["shape"]) != shape:
            interpreter.resize_tensor_input(detail["index"], shape)
    interpreter.allocate_tensors()
    for detail, value in zip(inputs, request.inputs, strict=True):
        interpreter.set_tensor(detail["index"], np.asarray(value, detail["dtype"]))
    interpreter.invoke()
    outputs = interpreter.get_output_details()
    return {number: interpreter.get_tensor(detail["index"]) for number, detail in enumerate(outputs)}
