"""Models that a service runs in its own process."""

import asyncio
import json

import pytest

from fedcompute.device.developer.connection import Refused
from fedcompute.device.developer.errors import IllegalState, Status
from fedcompute.device.developer.inference import InferenceInput, InferenceParams, ModelManager
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.owner import Owner
from fedcompute.device.personalization import Personalization
from fedcompute.device.state import key_values
from fedcompute.device.state.apps import App, install
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.device_log import read_entries

OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
# One process tries them all, because TensorFlow takes seconds to load.
HOOKS = """
def on_execute(self, request):
    import json
    cases = {
        "sums": ("model", [[[1.0, 2.0], [3.0, 4.0]]], 2),
        "one at a time": ("model", [[[1.0, 2.0]]], 1),
        "no such key": ("other", [[[1.0, 2.0]]], 1),
        "no model": ("text", [[[1.0, 2.0]]], 1),
        "another shape": ("model", [[[1.0, 2.0, 3.0]]], 1),
        "too many inputs": ("model", [[[1.0, 2.0]], [[1.0, 2.0]]], 1),
    }
    for name, (key, inputs, size) in cases.items():
        try:
            found = self.models.run(InferenceInput(InferenceParams(self.remote, key), inputs, size)).outputs[0].tolist()
        except OnDevicePersonalizationException as error:
            found = error.code.name
        print(json.dumps([name, found]))
    try:
        params = InferenceParams(self.remote, "model", ModelType.EXECUTORCH)
        self.models.run(InferenceInput(params, [[[1.0, 2.0]]]))
    except OnDevicePersonalizationException as error:
        print(json.dumps(["another form", error.code.name]))
    return ExecuteOutput()
"""


@pytest.fixture(scope="module")
def model():
    """A TensorFlow Lite model: of [n, 2] numbers the sum of each pair, doubled."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32)])
    def doubled_sums(x):
        return 2.0 * tf.reduce_sum(x, axis=1)

    concrete = doubled_sums.get_concrete_function()
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert()


def test_a_service_runs_its_models_and_hears_what_is_wrong_with_them(tmp_path, write_service, model):
    database = DeviceDatabase(tmp_path / "device.db")
    with database.write() as tx:
        install(tx, App(OWNER, write_service(tmp_path / "app", HOOKS)), 1)
        key_values.put_value(tx, "remote_data", OWNER, "model", model)
        key_values.put_value(tx, "remote_data", OWNER, "text", b"no model")
    operations = Personalization(database, clock=lambda: 2, user_data=UserData)
    asyncio.run(operations.execute(OWNER.package, OWNER.class_name, "org.example.caller", {}))
    with database.read() as tx:
        (entry,) = read_entries(tx)
    database.close()
    lines = [line for line in entry.output.splitlines() if line.startswith("[")]
    assert dict(json.loads(line) for line in lines) == {
        "sums": [6.0, 14.0],
        "one at a time": [6.0],
        "no such key": "INFERENCE_MODEL_NOT_FOUND",
        "no model": "INFERENCE_FAILED",
        "another shape": "INFERENCE_FAILED",
        "too many inputs": "INFERENCE_FAILED",
        "another form": "INFERENCE_FAILED",
    }


def test_an_operation_without_models_runs_none():
    def ask(method, arguments, kind):
        raise Refused(Status.PERMISSION_DENIED, "render has no models")

    with pytest.raises(IllegalState, match="render has no models"):
        ModelManager(ask).run(InferenceInput(InferenceParams(None, "model"), []))


@pytest.mark.parametrize("wrong", [{"model_key": ""}, {"threads": 0}])
def test_parameters_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError):
        InferenceParams(**{"store": None, "model_key": "k", **wrong})
    with pytest.raises(ValueError):
        InferenceInput(InferenceParams(None, "k"), [], batch_size=0)
