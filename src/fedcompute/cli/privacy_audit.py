"""`fedcompute privacy audit`: canaries in one run of a small real task, and what they prove about epsilon."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.errors import OperationFailed, Reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedcompute.learning.audit import AuditResult
    from fedcompute.privacy.noise import NoiseSource

app = typer.Typer()

# Devices that train on handwritten digits beside the canaries.
HONEST_DEVICES = 100
CLIP_NORM = 0.5
_LEARNING_RATE = 0.1
_LOCAL_STEPS = 5


class Mechanism(StrEnum):
    """Mechanisms by their names in a plan."""

    FIXED_GAUSSIAN = "fixed_gaussian"
    ADAPTIVE_GAUSSIAN = "adaptive_gaussian"
    TREE_AGGREGATION = "tree_aggregation"
    ADAPTIVE_TREE = "adaptive_tree"
    BANDED_MF = "banded_mf"


@app.command(
    epilog="Example: fedcompute privacy audit --noise-multiplier 5 --rounds 5 --mechanism fixed_gaussian --weaken 0.1"
)
def audit(
    noise_multiplier: Annotated[
        float,
        typer.Option(
            min=0.0, max=1000.0, help="Noise standard deviation over clip norm; 0 audits a task without noise."
        ),
    ] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Training rounds.")] = 5,
    canaries: Annotated[int, typer.Option(min=16, max=7850, help="Devices that a coin includes or leaves out.")] = 7850,
    mechanism: Annotated[Mechanism, typer.Option(help="The mechanism.")] = Mechanism.FIXED_GAUSSIAN,
    minimum_separation: Annotated[
        int, typer.Option(min=1, help="A canary takes part once in this many rounds; also the bands of banded_mf.")
    ] = 1,
    delta: Annotated[float, typer.Option(help="Probability that the promise may fail.")] = 1e-5,
    confidence: Annotated[float, typer.Option(help="Of the lower bounds.")] = 0.95,
    weaken: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Scale the noise in secret, to see that the audit notices.")
    ] = 1.0,
    as_json: options.AsJson = False,
) -> None:
    """Train on handwritten digits with canaries, and bound epsilon from below by what the models gave away."""
    for name, value in (("--delta", delta), ("--confidence", confidence)):
        if not 0 < value < 1:
            raise _invalid(f"{name}: {value:g} does not lie between 0 and 1")
    from fedcompute.learning.audit import WeakenedNoise
    from fedcompute.privacy.noise import SystemNoise

    source = SystemNoise()
    result, score = audit_digits(
        mechanism,
        noise_multiplier,
        rounds,
        canaries,
        delta,
        confidence=confidence,
        separation=minimum_separation,
        noise=source if weaken == 1 else WeakenedNoise(source, weaken),
    )
    if as_json:
        typer.echo(json.dumps(document(result, score)))
        return
    typer.echo("\n".join(_sentences(result, score)))


def audit_digits(
    mechanism: Mechanism,
    noise_multiplier: float,
    rounds: int,
    canaries: int,
    delta: float,
    *,
    confidence: float = 0.95,
    separation: int = 1,
    noise: "NoiseSource | None" = None,
    included: "NDArray[np.bool_] | None" = None,
) -> "tuple[AuditResult, float]":
    """Audits softmax regression on scikit-learn's digits; also the last model's accuracy on held-out digits.

    Arguments as `learning.audit.audit`. Raises OperationFailed (SETTINGS_INVALID) where an adaptive mechanism has too
    few devices for its noise.
    """
    from fedcompute.learning.audit import audit as run
    from fedcompute.learning.specification import training_process
    from fedcompute.models.datasets import DIGITS, IMAGE_SIDE, load_dataset
    from fedcompute.models.softmax_regression import accuracy, local_update, zero_weights
    from fedcompute.protos import learning_pb2
    from fedcompute.tensors.tree import LeafSpec

    data = load_dataset(DIGITS, HONEST_DEVICES, seed=0)
    weights = zero_weights(IMAGE_SIDE * IMAGE_SIDE, data.num_classes)
    process = training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("", weight.shape, weight.dtype) for weight in weights],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=_aggregator(mechanism, noise_multiplier, HONEST_DEVICES + canaries // 2, rounds, separation),
        metrics=[],
    )

    def devices(model: "Sequence[NDArray[np.floating]]") -> "Iterator[list[NDArray[np.float64]]]":
        for x, y in data.clients.values():
            yield local_update(model, x, y, _LEARNING_RATE, _LOCAL_STEPS)

    result = run(
        process,
        weights,
        devices,
        rounds=rounds,
        canaries=canaries,
        delta=delta,
        separation=separation,
        confidence=confidence,
        noise=noise,
        included=included,
    )
    return result, accuracy(result.weights, data.test_x, data.test_y)


def document(result: "AuditResult", score: float) -> dict[str, Any]:
    """An audit for programs: infinite epsilons are null."""
    numbers: Mapping[str, float] = {
        "claimed_epsilon": result.claimed_epsilon,
        "epsilon_lower_bound": result.epsilon,
        "gaussian_epsilon_lower_bound": result.gaussian_epsilon,
        "largest_lower_bound": result.largest_epsilon,
        "delta": result.delta,
        "confidence": result.confidence,
        "accuracy": score,
    }
    return {
        "rounds": result.rounds,
        "canaries": result.canaries,
        "guesses": result.guesses,
        "correct": result.correct,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "refuted": result.refuted,
    }


def _sentences(result: "AuditResult", score: float) -> list[str]:
    verdict = (
        "REFUTED: the models gave away more than the claim allows."
        if result.refuted
        else "Not refuted: this audit found nothing against the claim, which is no proof of it."
    )
    if math.isinf(result.claimed_epsilon):
        verdict = "Nothing is claimed: the task has no noise."
    return [
        f"{result.canaries} canaries, {result.rounds} rounds; {result.correct} of {result.guesses} guesses right, "
        f"accuracy {score:.3f}; delta {result.delta:g}, confidence {result.confidence:g}",
        f"  claimed epsilon      {result.claimed_epsilon:8.3f}",
        f"  at least             {result.epsilon:8.3f}  for any mechanism "
        f"(so many canaries show at most {result.largest_epsilon:.3f})",
        f"  at least             {result.gaussian_epsilon:8.3f}  if the releases are Gaussian",
        verdict,
    ]


def _aggregator(mechanism: Mechanism, multiplier: float, report_goal: int, rounds: int, separation: int) -> Any:
    from fedcompute.privacy.banded import optimal_coefficients
    from fedcompute.protos import learning_pb2

    adaptive: dict[str, Any] = {"target_quantile": 0.5, "learning_rate": 0.2}
    zeroing: dict[str, Any] = {"zeroing_norm": 100 * CLIP_NORM}
    common: dict[str, Any] = {"noise_multiplier": multiplier, "report_goal": report_goal}
    if mechanism in (Mechanism.ADAPTIVE_GAUSSIAN, Mechanism.ADAPTIVE_TREE):
        if 10 * multiplier >= report_goal:
            raise _invalid(f"--noise-multiplier: {multiplier:g} is not below a tenth of {report_goal} devices")
        common["initial_clip_norm"] = CLIP_NORM
    else:
        common["clip_norm"] = CLIP_NORM
    match mechanism:
        case Mechanism.FIXED_GAUSSIAN:
            return learning_pb2.FixedGaussian(**common)
        case Mechanism.ADAPTIVE_GAUSSIAN:
            return learning_pb2.AdaptiveGaussian(**common, **adaptive)
        case Mechanism.TREE_AGGREGATION:
            return learning_pb2.TreeAggregation(**common, **zeroing)
        case Mechanism.ADAPTIVE_TREE:
            restart: dict[str, Any] = {"restart_period": 1024, "restart_offset": 128}
            return learning_pb2.AdaptiveTree(**common, **adaptive, **zeroing, **restart)
    coefficients = optimal_coefficients(rounds, separation)
    return learning_pb2.BandedMatrixFactorization(**common, coefficients=coefficients)


def _invalid(detail: str) -> OperationFailed:
    return OperationFailed(Reason.SETTINGS_INVALID, detail, remedy="see --help of this command for an example")
