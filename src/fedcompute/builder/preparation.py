"""What a task asks of devices and server, before anything is made into artifacts."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedcompute.builder.client_graph import ClientSettings
from fedcompute.builder.composition import Choices, choose, choose_metrics, compose
from fedcompute.builder.differential_privacy import Accounting, account, check_dp, metric_noise
from fedcompute.builder.dp_types import CHECKPOINT_BYTES, DP_TYPES, bands_in_memory, tree_bytes
from fedcompute.builder.validation import DEFAULT_POPULATION, BuildSettings, validate
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.protos import learning_pb2, task_builder_pb2
from fedcompute.tracing import span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTask:
    """A valid configuration, the model, the training process without its claim, and what devices are told to do.

    `client` has no example selector yet. `metrics`: the accepted ones, in the configuration's order.
    """

    settings: BuildSettings
    accounting: Accounting
    model: FunctionalModel
    process: learning_pb2.LearningProcess
    client: ClientSettings
    metrics: tuple[str, ...]


def prepare_task(
    load_model: Callable[[], FunctionalModel],
    config: task_builder_pb2.TaskConfig,
    flags: task_builder_pb2.ExperimentFlags,
    report: task_builder_pb2.TaskReport,
    *,
    default_population: int = DEFAULT_POPULATION,
) -> PreparedTask:
    """Checks the configuration, begins the accounting, loads the model and composes the training process.

    `report` is filled as far as the work gets, also when it raises: ConfigInvalid (rules, DP check, values this builder
    does not offer), ArtifactInvalid (the model).
    """
    with span("validate"):
        settings = validate(config, flags, default_population=default_population)
        _report_settings(report, settings, flags)
        choices = choose(settings)
    logger.info("Basic config is valid. Start validating differential privacy setup...")
    with span("differential_privacy"):
        accounting = _differential_privacy(settings, flags, report)
    logger.info("Task config is valid! Start building the task group.")
    metrics = choose_metrics(settings.metrics)
    report.metric_results.accepted_metrics = ", ".join(metrics.accepted)
    report.metric_results.rejected_metrics = ", ".join(metrics.rejected)
    report.warnings.extend(metrics.warnings)
    with span("load_model"):
        model = load_model()
    process = _process(choices, model, metrics.accepted, None if flags.skip_dp_aggregator else accounting, report)
    client = ClientSettings(
        label_name=settings.config.label_name,
        batch_size=settings.batch_size,
        max_batches=settings.max_batches,
        optimizer=choices.client_optimizer,
        learning_rate=settings.client_learning_rate,
        selector=b"",
    )
    return PreparedTask(settings, accounting, model, process, client, metrics.accepted)


def _process(
    choices: Choices,
    model: FunctionalModel,
    metrics: Sequence[str],
    accounting: Accounting | None,
    report: task_builder_pb2.TaskReport,
) -> learning_pb2.LearningProcess:
    """The training process, without its claim, whose epsilon is not known yet; `accounting` None: no DP at all."""
    if accounting is None:
        return compose(choices, model, choices.algorithm.plain, metrics)
    dp = accounting.parameters
    parameters = sum(weight.size for weight in model.trainable)
    bands = bands_in_memory(dp.bands, parameters)
    if DP_TYPES[dp.type].mechanism == "banded_mf":
        report.warnings.append(f"the noise of BANDED_MF is correlated over {bands} rounds")
        if bands < dp.bands:
            report.warnings.append(f"{dp.bands} rounds would need more memory for a model of this size")
    noise_bytes = tree_bytes(dp.rounds, parameters)
    if "tree" in DP_TYPES[dp.type].mechanism and noise_bytes > CHECKPOINT_BYTES // 2:
        report.warnings.append(
            f"the noise of the tree takes up to {noise_bytes >> 20} MiB of a server checkpoint, which may have "
            f"{CHECKPOINT_BYTES >> 20} MiB unless the server's max_checkpoint_bytes says otherwise"
        )
    aggregator = DP_TYPES[dp.type].aggregator(replace(dp, bands=bands))
    return compose(choices, model, aggregator, metrics, metric_noise(dp))


def _report_settings(
    report: task_builder_pb2.TaskReport, settings: BuildSettings, flags: task_builder_pb2.ExperimentFlags
) -> None:
    applied = report.applied_algorithms
    applied.learning_algo = settings.algorithm
    applied.client_optimizer = settings.client_optimizer
    applied.server_optimizer = settings.server_optimizer
    for warning in settings.warnings:
        logger.warning("%s", warning)
        report.warnings.append(warning)
    for field, _ in flags.ListFields():
        report.warnings.append(f"built with {field.name}")
        logger.warning("The build for population %r uses %s.", settings.population, field.name)
    if settings.config.use_daf:
        report.warnings.append("use_daf has no effect: plans carry the server's half as data")


def _differential_privacy(
    settings: BuildSettings, flags: task_builder_pb2.ExperimentFlags, report: task_builder_pb2.TaskReport
) -> Accounting:
    """The checked parameters; their exact epsilon is being computed when this returns."""
    accounting = account(settings)
    dp = accounting.parameters
    if not flags.skip_dp_aggregator:
        report.applied_algorithms.dp_aggregator = dp.type
    hyperparameters = report.dp_hyperparameters
    hyperparameters.dp_delta = dp.delta
    # A bound until the exact value is known.
    hyperparameters.dp_epsilon = dp.epsilon
    hyperparameters.noise_multiplier = dp.noise_multiplier
    hyperparameters.dp_clip_norm = dp.clip_norm
    hyperparameters.num_training_rounds = dp.rounds
    if flags.skip_dp_aggregator:
        report.warnings.append("the plan clips nothing and adds no noise; dp_hyperparameters are not applied")
    if not flags.skip_dp_check:
        check_dp(accounting)
    accounting.begin()
    return accounting
