"""A task configuration to start from, every field with its meaning (spec/task-builder.md 1)."""

from google.protobuf import text_format

from fedcompute.protos import task_builder_pb2

_Mode = task_builder_pb2.TaskMode

_HEAD = """\
# A task configuration in protobuf text format. Every field of it is here; those in comments show their defaults.
# Check it with: fedcompute task validate {file}

# What is built: TRAINING_ONLY, TRAINING_AND_EVAL (both) or EVAL_ONLY.
mode: {mode}
# The devices that take part: the name that their app asks for.
population_name: {population}
# Name of the label in an example, for models whose input is a dictionary of features. A model whose input is one
# tensor reads the features "x" and the label "y".
{label}
# Plans are the same with and without it.
# use_daf: false

policies {{
  # Rounds between two contributions of one device.
  min_separation_policy {{ minimum_separation: 1 }}
  # A device with fewer examples does not take part.
  data_availability_policy {{ min_example_count: 1 }}
  model_release_policy {{
    # Rounds after which the task is complete.
    num_max_training_rounds: {rounds}
    # The privacy that those rounds promise: epsilon at most 10, at a delta of at most 1 over the estimated population.
    # dp_target_epsilon: 10
    # dp_delta: 0.000001
  }}
  # On the device: examples per step, and steps per round (-1: all examples).
  # dataset_policy {{ batch_size: 3 max_training_batches_per_client: -1 }}
}}

federated_learning {{
  learning_process {{
    # FED_AVG: a device trains and sends how far its weights moved. FED_SGD: it sends one gradient.
    type: FED_AVG
    # SGD or ADAM; learning rates from 0 to 1.
    client_optimizer: SGD
    client_learning_rate: 0.1
    server_optimizer: SGD
    server_learning_rate: 1.0
    runtime_config {{
      # Devices whose updates make a round.
      report_goal: {report_goal}
      # Share of devices that are assigned beyond it, since some never report.
      # over_selection_rate: 0.3
      # Which examples the app's worker is asked for.
      # example_selector_uri: "app://my_collection"
    }}
    # Measured on the devices in each round, besides the loss; remove what does not fit your model's output.
    # metrics {{ name: "sparse_categorical_accuracy" }}
    # Where an artifact-only build writes; unused otherwise.
    # artifact_building {{ plan_url: "" client_plan_url: "" checkpoint_url: "" }}
  }}
"""
_EVALUATION = """\
  evaluation {{
    # The training task whose checkpoints are evaluated; the first task of a population has the id 1.
    source_training_task_id: 1
    # source_training_population: {population}
    # One checkpoint of every k rounds or hours: every_k_round or every_k_hour.
    checkpoint_selector: "every_1_round"
    # Share of the devices that evaluate instead of training.
    evaluation_traffic: 0.1
    # Devices that make one evaluation.
    report_goal: {evaluation_goal}
    # over_selection_rate: 0.3
    # example_selector_uri: "app://my_collection"
    # artifact_building {{ plan_url: "" client_plan_url: "" checkpoint_url: "" }}
  }}
"""
_TAIL = """\
}}

differential_privacy {{
  # FIXED_GAUSSIAN, ADAPTIVE_GAUSSIAN, TREE_AGGREGATION, ADAPTIVE_TREE or BANDED_MF.
  type: FIXED_GAUSSIAN
  # Largest L2 norm of one device's update; a longer update is scaled down to it.
  clip_norm: 0.1
  # Its first value, for the two adaptive types.
  # init_clip_norm: 0.1
  # Standard deviation of the noise, in clip norms. Left out, it is calibrated to the target epsilon.
  noise_multiplier: 1.0
  # Devices that a round draws from; the accounting rests on it.
  estimated_population: 1000000
  # How devices are assumed to come to rounds. POISSON and FIXED_SIZE: a random sample of the population each round,
  # which devices that come when they like are not. MIN_SEPARATION: when they like, minimum_separation rounds apart.
  # NO_AMPLIFICATION: when they like. The default is POISSON, and MIN_SEPARATION for BANDED_MF.
  # participation: POISSON
  # Clips and noises the metrics of each round as a part of the same budget; 0: they are released as they are.
  # metrics_clip_norm: 0
  # metrics_noise_multiplier: 0
}}
"""


def sample_config(
    mode: int = _Mode.TRAINING_AND_EVAL,
    *,
    population: str = "my_population",
    label_name: str = "",
    rounds: int = 1000,
    report_goal: int = 500,
    file: str = "task_config.pbtxt",
) -> str:
    """A commented configuration in text format that satisfies every rule; `file` is the name its advice mentions."""
    template = _HEAD + (_EVALUATION if mode != _Mode.TRAINING_ONLY else "") + _TAIL
    return template.format(
        mode=_Mode.Enum.Name(mode),
        population=_quoted(population),
        label=f"label_name: {_quoted(label_name)}" if label_name else '# label_name: "my_label"',
        rounds=rounds,
        report_goal=report_goal,
        evaluation_goal=max(1, report_goal // 10),
        file=file,
    )


def _quoted(text: str) -> str:
    # The library's own escapes, whatever the text holds.
    written = text_format.MessageToString(task_builder_pb2.TaskConfig(population_name=text), as_utf8=True)
    return written.removeprefix("population_name: ").strip()
