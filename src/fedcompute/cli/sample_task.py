"""The task of the quickstart: its configuration, and the two jobs around it that need TensorFlow.

The jobs run in a worker process, so the process that serves never loads TensorFlow.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

POPULATION = "quickstart"
REPORT_GOAL = 10
EVALUATION_REPORT_GOAL = 8
EVALUATION_TRAFFIC = 0.25
TARGET_EPSILON = 10.0


@dataclass(frozen=True)
class SampleTask:
    """What the quickstart trains. `directory` takes models and configuration; `noise_multiplier` 0 means no DP."""

    directory: Path
    model: str
    data: str
    devices: int
    rounds: int
    noise_multiplier: float
    seed: int = 0

    @property
    def dp_delta(self) -> float:
        """At most one in the number of devices, and never above a thousandth."""
        return min(1e-3, 1.0 / self.devices)

    @property
    def minimum_separation(self) -> int:
        """Rounds between two contributions of a device, such that enough others are left for the rounds between."""
        return 2 if self.devices >= 4 * REPORT_GOAL else 1

    @property
    def saved_model(self) -> Path:
        return self.directory / "saved_model"

    @property
    def config(self) -> Path:
        return self.directory / "task_config.pbtxt"

    @property
    def log(self) -> Path:
        """What TensorFlow and the builder have to say."""
        return self.directory / "build.log"


@dataclass(frozen=True)
class BuiltSample:
    """Serialized tasks and artifacts, and the initial model's accuracy (0 to 1) and loss on held-out images.

    `training` and `evaluation`: (task, plan, client plan, checkpoint). `classes`: how many labels the data has.
    """

    training: tuple[bytes, bytes, bytes, bytes]
    evaluation: tuple[bytes, bytes, bytes, bytes]
    warnings: tuple[str, ...]
    clip_norm: float
    parameters: int
    images: int
    test_images: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Judged:
    """A trained model on the held-out images, and where it was exported."""

    accuracy: float
    loss: float
    keras_file: Path
    saved_model: Path


def config_text(task: SampleTask) -> str:
    """The task configuration in text format, as a user would write it."""
    from fedcompute.models.zoo import SAMPLE_MODELS

    model = SAMPLE_MODELS[task.model]
    metrics = "\n".join(f'    metrics {{ name: "{name}" }}' for name in model.metrics)
    # Unset would be calibrated, which takes a while and serves nothing where no noise is added.
    noise = (
        f"noise_multiplier: {task.noise_multiplier:g}"
        if task.noise_multiplier > 0
        else "noise_multiplier: 1  # not applied: built with skip_dp_aggregator"
    )
    return f"""\
# Built by `fedcompute quickstart`; change it and build again with `fedcompute task build`.
mode: TRAINING_AND_EVAL
population_name: "{POPULATION}"
policies {{
  # A device takes part at most once in this many rounds.
  min_separation_policy {{ minimum_separation: {task.minimum_separation} }}
  data_availability_policy {{ min_example_count: 1 }}
  model_release_policy {{
    num_max_training_rounds: {task.rounds}
    dp_target_epsilon: {TARGET_EPSILON:g}
    dp_delta: {task.dp_delta:g}
  }}
  dataset_policy {{ batch_size: {model.batch_size} }}
}}
federated_learning {{
  learning_process {{
    type: FED_AVG
    client_optimizer: SGD
    client_learning_rate: {model.client_learning_rate:g}
    server_optimizer: SGD
    server_learning_rate: {model.server_learning_rate:g}
    runtime_config {{ report_goal: {min(REPORT_GOAL, task.devices)} }}
{metrics}
  }}
  evaluation {{
    source_training_task_id: 1
    checkpoint_selector: "every_1_round"
    evaluation_traffic: {EVALUATION_TRAFFIC:g}
    report_goal: {min(EVALUATION_REPORT_GOAL, task.devices)}
  }}
}}
differential_privacy {{
  type: FIXED_GAUSSIAN
  {noise}
  clip_norm: {model.clip_norm:g}
  # Accounting samples from the devices that there are.
  estimated_population: {task.devices}
}}
"""


def build_sample(task: SampleTask) -> BuiltSample:
    """Saves the untrained model and its configuration, builds both tasks and judges the untrained model."""
    _log_to(task.log)
    from fedcompute.builder.artifacts import BuiltTask
    from fedcompute.builder.build import build_task_group
    from fedcompute.builder.config import read_config
    from fedcompute.models.datasets import load_dataset
    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model
    from fedcompute.models.zoo import SAMPLE_MODELS, build_seeded
    from fedcompute.protos import task_builder_pb2

    sample = SAMPLE_MODELS[task.model]
    dataset = load_dataset(task.data, task.devices, task.seed)
    keras_model = build_seeded(sample, task.seed)
    functional = functional_model_from_keras(
        keras_model=keras_model, loss_fn=sample.loss_fn(), input_spec=sample.input_spec()
    )
    save_functional_model(functional, task.saved_model)
    text = config_text(task)
    task.config.write_text(text)
    flags = task_builder_pb2.ExperimentFlags(
        # So few devices cannot reach a small epsilon; the quickstart says so instead of refusing.
        skip_dp_check=True,
        skip_dp_aggregator=task.noise_multiplier == 0,
        # Lowered to what phones have, its training takes 1.6 times as long on the devices of the quickstart.
        skip_flex_ops_check=task.model == "emnist-cnn",
    )
    group = build_task_group(task.saved_model, read_config(text.encode()).config, flags)
    if group.training is None or group.evaluation is None:
        raise AssertionError("the configuration asks for both tasks")

    def parts(built: BuiltTask) -> tuple[bytes, bytes, bytes, bytes]:
        return built.task.SerializeToString(), built.plan, built.client_plan, built.checkpoint

    accuracy, loss = _judge(keras_model, sample.loss_fn(), dataset.test_x, dataset.test_y)
    return BuiltSample(
        training=parts(group.training),
        evaluation=parts(group.evaluation),
        warnings=tuple(group.report.warnings),
        clip_norm=sample.clip_norm,
        parameters=int(keras_model.count_params()),
        images=sum(len(y) for _, y in dataset.clients.values()),
        test_images=len(dataset.test_y),
        accuracy=accuracy,
        loss=loss,
    )


def judge_sample(argument: tuple[SampleTask, bytes]) -> Judged:
    """Puts a server checkpoint's weights into the Keras model, exports it and judges it on the held-out images."""
    from dataclasses import replace

    from fedcompute.models.datasets import load_dataset
    from fedcompute.models.functional_model import assign_weights, functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model
    from fedcompute.models.zoo import SAMPLE_MODELS
    from fedcompute.tensors.checkpoint import read_checkpoint
    from fedcompute.tensors.tree import subtree

    task, checkpoint = argument
    sample = SAMPLE_MODELS[task.model]
    dataset = load_dataset(task.data, task.devices, task.seed)
    trainable = list(subtree(read_checkpoint(checkpoint), "server/global_model_weights/trainable").values())
    keras_model = sample.build()
    assign_weights(keras_model, trainable)
    keras_file = task.directory / "trained.keras"
    saved_model = task.directory / "trained_saved_model"
    keras_model.save(keras_file)
    functional = functional_model_from_keras(
        keras_model=keras_model, loss_fn=sample.loss_fn(), input_spec=sample.input_spec()
    )
    save_functional_model(replace(functional, trainable=tuple(trainable)), saved_model)
    accuracy, loss = _judge(keras_model, sample.loss_fn(), dataset.test_x, dataset.test_y)
    return Judged(accuracy, loss, keras_file, saved_model)


def _judge(keras_model: Any, loss_fn: Any, x: Any, y: Any) -> tuple[float, float]:
    scores = keras_model(x, training=False)
    labels = np.reshape(y, -1)
    accuracy = float(np.mean(np.argmax(np.asarray(scores), axis=-1) == labels))
    return accuracy, float(loss_fn(labels.reshape(-1, 1), scores))


def _log_to(file: Path) -> None:
    """Sends this worker process's standard error to a file; TensorFlow writes there before it can be told not to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
