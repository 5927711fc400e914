"""`fedcompute privacy epsilon` and `noise`: what a setting promises, before anything is built."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.cli.privacy_audit import Mechanism
from fedcompute.cli.progress import waiting
from fedcompute.errors import OperationFailed, Reason

if TYPE_CHECKING:
    from fedcompute.privacy.bounds import Bounds
    from fedcompute.privacy.composition import TaskReleases
    from fedcompute.privacy.participation import Assumption, Participation
    from fedcompute.privacy.planned import PlannedRounds

DEFAULT_DEVICES = 1_000_000
# More rounds than any task has; accountants compute with them still.
_MOST_ROUNDS = 10**9
# Below it the exact value of sampled noise takes long enough for bounds to be welcome before it.
_WEAK_NOISE = 0.4
# Relative width at which the search of `noise --quick` ends.
_QUICK_WIDTH = 1e-4
# Noise beyond which the search for a target gives up.
_MOST_NOISE = 1e9
# An assumption that makes epsilon so many times smaller is worth a warning.
_NOTABLE = 2.0

app = typer.Typer()


class Arrival(StrEnum):
    """How devices come to rounds, as `privacy.participation.Participation` has it."""

    POISSON = "poisson"
    FIXED_SIZE = "fixed_size"
    MIN_SEPARATION = "min_separation"
    NO_AMPLIFICATION = "no_amplification"


_MECHANISM = Annotated[Mechanism, typer.Option(help="What makes the noise.")]
_ROUNDS = Annotated[int, typer.Option(min=1, max=_MOST_ROUNDS, help="Training rounds, each of them one release.")]
_REPORT_GOAL = Annotated[int, typer.Option(min=1, help="Devices per round.")]
_DEVICES = Annotated[
    int, typer.Option("--devices", "--estimated-population", min=1, help="Devices that rounds are drawn from.")
]
_DELTA = Annotated[
    float | None, typer.Option(help="Probability that the promise may fail.", show_default="1 over --devices")
]
_ARRIVAL = Annotated[
    Arrival | None,
    typer.Option(
        "--participation",
        help="What is assumed about when devices come: a random sample each round (poisson, fixed_size), when they "
        "like but with the minimum separation, or when they like (no_amplification).",
        show_default="poisson; min_separation for banded_mf",
    ),
]
_SEPARATION = Annotated[
    int, typer.Option("--minimum-separation", min=0, help="A device takes part at most once in this many rounds.")
]
_BANDS = Annotated[
    int | None,
    typer.Option(min=1, help="Bands of banded_mf's matrix.", show_default="the minimum separation, at most 64"),
]
_METRICS_NOISE = Annotated[
    float,
    typer.Option(min=0.0, help="Noise standard deviation over clip norm of the metric sums; 0: not noised or counted."),
]
_QUICK = Annotated[
    bool, typer.Option("--quick", help="Stop at proven bounds, which take a second; the exact value may take a minute.")
]


@dataclass(frozen=True)
class Setting:
    """What is asked about; noise multiplier and metrics noise are deviations over clip norms, sizes are devices."""

    mechanism: Mechanism
    noise_multiplier: float
    rounds: int
    report_goal: int
    devices: int
    delta: float
    participation: "Participation"
    minimum_separation: int
    bands: int
    metrics_noise_multiplier: float

    @property
    def assumption(self) -> "Assumption":
        from fedcompute.privacy.participation import Assumption

        return Assumption(self.participation, self.devices, self.report_goal, self.minimum_separation)

    @property
    def planned(self) -> "PlannedRounds":
        from fedcompute.privacy.planned import planned_rounds

        return planned_rounds(
            self.mechanism.value,
            self.noise_multiplier,
            self.rounds,
            report_goal=self.report_goal,
            bands=self.bands,
            metrics_noise_multiplier=self.metrics_noise_multiplier,
        )

    def task(self, participation: "Participation | None" = None) -> "TaskReleases":
        """The releases, under the setting's own assumption or another one."""
        from fedcompute.privacy.composition import TaskReleases

        assumption = self.assumption
        if participation is not None:
            assumption = replace(assumption, participation=participation)
        return TaskReleases(self.planned, assumption)


@app.command(
    epilog="Example: fedcompute privacy epsilon --noise-multiplier 1 --rounds 1000 --report-goal 2000 --devices 1000000"
)
def epsilon(
    noise_multiplier: Annotated[float, typer.Option(min=0.0, help="Noise standard deviation over clip norm.")],
    rounds: _ROUNDS,
    report_goal: _REPORT_GOAL,
    devices: _DEVICES = DEFAULT_DEVICES,
    delta: _DELTA = None,
    mechanism: _MECHANISM = Mechanism.FIXED_GAUSSIAN,
    participation: _ARRIVAL = None,
    minimum_separation: _SEPARATION = 0,
    bands: _BANDS = None,
    metrics_noise_multiplier: _METRICS_NOISE = 0.0,
    quick: _QUICK = False,
    as_json: options.AsJson = False,
) -> None:
    """Epsilon of a task: under what is assumed about its devices, and without assuming anything."""
    setting = _setting(
        *(mechanism, noise_multiplier, rounds, report_goal, devices, delta, participation),
        *(minimum_separation, bands, metrics_noise_multiplier),
    )
    _check_noise(setting)
    _answer(setting, quick=quick, as_json=as_json)


@app.command(
    epilog="Example: fedcompute privacy noise --target-epsilon 10 --rounds 1000 --report-goal 2000 --devices 1000000"
)
def noise(
    target_epsilon: Annotated[float, typer.Option(help="Epsilon that must not be exceeded; greater than 0.")],
    rounds: _ROUNDS,
    report_goal: _REPORT_GOAL,
    devices: _DEVICES = DEFAULT_DEVICES,
    delta: _DELTA = None,
    mechanism: _MECHANISM = Mechanism.FIXED_GAUSSIAN,
    participation: _ARRIVAL = None,
    minimum_separation: _SEPARATION = 0,
    bands: _BANDS = None,
    metrics_noise_multiplier: _METRICS_NOISE = 0.0,
    quick: _QUICK = False,
    as_json: options.AsJson = False,
) -> None:
    """The smallest noise multiplier that keeps to a target epsilon, by the task builder's accounting."""
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise _invalid(f"--target-epsilon: {target_epsilon:g} is not greater than 0")
    setting = _setting(
        *(mechanism, 1.0, rounds, report_goal, devices, delta, participation),
        *(minimum_separation, bands, metrics_noise_multiplier),
    )
    with waiting("calibrating the noise multiplier ..."), _accounted():
        found = _calibrated(setting, target_epsilon, quick=quick)
    setting = replace(setting, noise_multiplier=found)
    _check_noise(setting)
    _answer(setting, quick=quick, as_json=as_json)


def _setting(
    mechanism: Mechanism,
    noise_multiplier: float,
    rounds: int,
    report_goal: int,
    devices: int,
    delta: float | None,
    participation: Arrival | None,
    minimum_separation: int,
    bands: int | None,
    metrics_noise_multiplier: float,
) -> Setting:
    from fedcompute.builder.dp_types import bands_of
    from fedcompute.builder.privacy_rules import PARTICIPATIONS
    from fedcompute.privacy.participation import Participation

    for option, value in (
        ("--noise-multiplier", noise_multiplier),
        ("--metrics-noise-multiplier", metrics_noise_multiplier),
    ):
        if not math.isfinite(value):
            raise _invalid(f"{option}: {value:g} is no finite number")
    if report_goal > devices:
        raise _invalid(f"--report-goal: {report_goal:,} of {devices:,} devices")
    if delta is not None and not 0 < delta < 1:
        raise _invalid(f"--delta: {delta:g} does not lie between 0 and 1")
    known = PARTICIPATIONS[_type_of(mechanism)]
    chosen = known[0] if participation is None else Participation[participation.name]
    if chosen not in known:
        fitting = ", ".join(one.name.lower() for one in known)
        raise _invalid(f"--participation: {mechanism.value} can be accounted for under {fitting} only")
    if bands is not None and mechanism is not Mechanism.BANDED_MF:
        raise _invalid(f"--bands: {mechanism.value} has none, only banded_mf has")
    if bands is not None and bands > rounds:
        raise _invalid(f"--bands: {bands:,} in {rounds:,} rounds")
    if min(minimum_separation, rounds) * report_goal > devices:
        raise _invalid(
            f"--minimum-separation: {min(minimum_separation, rounds):,} rounds of {report_goal:,} different devices "
            f"each need {min(minimum_separation, rounds) * report_goal:,} devices, and there are {devices:,}"
        )
    return Setting(
        mechanism=mechanism,
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        report_goal=report_goal,
        devices=devices,
        delta=1 / max(devices, 2) if delta is None else delta,
        participation=chosen,
        minimum_separation=minimum_separation,
        bands=bands or bands_of(minimum_separation, rounds),
        metrics_noise_multiplier=metrics_noise_multiplier,
    )


def _check_noise(setting: Setting) -> None:
    """Refuses noise that no round can add."""
    from fedcompute.builder.privacy_rules import MAX_NOISE_MULTIPLIER, noise_bound

    multiplier, goal = setting.noise_multiplier, setting.report_goal
    for option, value, most in (
        ("--noise-multiplier", multiplier, noise_bound(_type_of(setting.mechanism), setting.rounds)),
        ("--metrics-noise-multiplier", setting.metrics_noise_multiplier, MAX_NOISE_MULTIPLIER),
    ):
        if value > most:
            raise _invalid(f"{option}: {value:g} is above {most:.6g}, the most that a round can hold exactly")
    if setting.mechanism in (Mechanism.ADAPTIVE_GAUSSIAN, Mechanism.ADAPTIVE_TREE) and multiplier * 10 >= goal:
        raise _invalid(
            f"--noise-multiplier: {multiplier:g} is not below a tenth of the {goal:,} devices of a round, which "
            f"{setting.mechanism.value} needs to follow their norms"
        )


def _type_of(mechanism: Mechanism) -> int:
    from fedcompute.protos import task_builder_pb2

    return task_builder_pb2.DpAggregator.Enum.Value(mechanism.name)


def _calibrated(setting: Setting, target: float, *, quick: bool) -> float:
    from fedcompute.privacy.bounds import epsilon_bounds
    from fedcompute.privacy.planned import calibrated_noise

    def bounds(noise_multiplier: float) -> "Bounds":
        # The split of adaptive types does not change what they spend, and must not stop the search.
        return epsilon_bounds([replace(setting, noise_multiplier=noise_multiplier).task()], setting.delta)

    try:
        first = bounds(1.0)
        if not quick or first.lower == first.upper:
            return calibrated_noise(setting.planned, setting.assumption, target, setting.delta)
    except ValueError as error:
        option = "--metrics-noise-multiplier" if setting.metrics_noise_multiplier else "--target-epsilon"
        raise _invalid(f"{option}: {error}") from error
    return _searched(lambda noise_multiplier: bounds(noise_multiplier).upper, target)


def _searched(epsilon: Callable[[float], float], target: float) -> float:
    """The noise multiplier, at most 1e-4 too large, with which the falling `epsilon` meets the target.

    Between two multipliers epsilon is near a power of them, so that few steps are needed.
    """
    low = high = 1.0
    above = below = epsilon(1.0)
    while above <= target:
        low, high, below = low / 2, low, above
        above = epsilon(low)
    while below > target:
        low, high, above = high, 2 * high, below
        if high > _MOST_NOISE:
            raise _invalid(f"--target-epsilon: no noise multiplier keeps to {target:g}")
        below = epsilon(high)
    while high - low > _QUICK_WIDTH * high:
        share = math.log(above / target) / math.log(above / below) if 0 < below < above < math.inf else 0.5
        guess = low * (high / low) ** share
        guess = min(max(guess, low * (1 + _QUICK_WIDTH / 2)), high * (1 - _QUICK_WIDTH / 2))
        value = epsilon(guess)
        if value > target:
            low, above = guess, value
        else:
            high, below = guess, value
    return high


def _answer(setting: Setting, *, quick: bool, as_json: bool) -> None:
    from fedcompute.privacy.bounds import epsilon_bounds
    from fedcompute.privacy.composition import epsilon as exact_epsilon
    from fedcompute.privacy.composition import unamplified_epsilon
    from fedcompute.privacy.participation import Participation

    task, delta = setting.task(), setting.delta
    with waiting("accounting ..."), _accounted():
        whole = unamplified_epsilon([task], delta)
        separated = exact_epsilon([setting.task(Participation.MIN_SEPARATION)], delta)
        bounds = epsilon_bounds([task], delta)
    claimed = bounds.upper if bounds.lower == bounds.upper else None
    if as_json:
        if claimed is None and not quick:
            claimed = exact_epsilon([task], delta)
        typer.echo(json.dumps(document(setting, claimed, bounds, separated, whole)))
        return
    typer.echo(_headline(setting))
    words = _claim_words(setting)
    if claimed is None and (quick or setting.noise_multiplier < _WEAK_NOISE):
        typer.echo(f"  epsilon {bounds.lower:.6g} to {bounds.upper:.6g} (proven)  {words}")
        words = "is the exact value"
    if claimed is None and not quick:
        with waiting("computing the exact value ..."), _accounted():
            claimed = exact_epsilon([task], delta)
    if claimed is not None:
        typer.echo(f"  epsilon {claimed:.6g}  {words}")
    if setting.minimum_separation > 1 and setting.participation != Participation.MIN_SEPARATION:
        typer.echo(f"  epsilon {separated:.6g}  {_separation_words(setting)}")
    if setting.participation != Participation.NO_AMPLIFICATION:
        typer.echo(f"  epsilon {whole:.6g}  for a device that takes part in every round (without amplification)")
    if text := _warning(setting, bounds.upper if claimed is None else claimed, whole):
        typer.echo(f"warning: {text}")


def document(
    setting: Setting, claimed: float | None, bounds: "Bounds", separated: float, whole: float
) -> dict[str, Any]:
    """The answer for programs; always the same names, and null for what is infinite or was not computed.

    `claimed_epsilon`: under the setting's participation; `sampled_epsilon`: the same where that is random sampling;
    `epsilon`: for a device that comes whenever the minimum separation lets it, `participations` times;
    `unamplified_epsilon`: for one that comes in every round.
    """
    from fedcompute.privacy.participation import Participation

    sampled = setting.participation in (Participation.POISSON, Participation.FIXED_SIZE)
    numbers = {
        "claimed_epsilon": claimed,
        "lower_bound": bounds.lower,
        "upper_bound": bounds.upper,
        "sampled_epsilon": claimed if sampled else None,
        "epsilon": separated,
        "unamplified_epsilon": whole,
    }
    return {
        "mechanism": setting.mechanism.value,
        "noise_multiplier": setting.noise_multiplier,
        "rounds": setting.rounds,
        "report_goal": setting.report_goal,
        "devices": setting.devices,
        "delta": setting.delta,
        "participation": setting.participation.name.lower(),
        "minimum_separation": setting.minimum_separation,
        "participations": _participations(setting),
        "bands": setting.bands if setting.mechanism is Mechanism.BANDED_MF else None,
        "metrics_noise_multiplier": setting.metrics_noise_multiplier,
        **{name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()},
        "warning": _warning(setting, bounds.upper if claimed is None else claimed, whole),
    }


def _headline(setting: Setting) -> str:
    name = setting.mechanism.value.replace("_", " ")
    bands = f" with {setting.bands} bands" if setting.mechanism is Mechanism.BANDED_MF else ""
    metrics = setting.metrics_noise_multiplier
    counted = f", metrics noised with {metrics:g}" if metrics else ", metrics not counted"
    return (
        f"{name}{bands}, noise multiplier {setting.noise_multiplier:.6g}, {setting.rounds:,} rounds of "
        f"{setting.report_goal:,} out of {setting.devices:,} devices, delta {setting.delta:g}{counted}"
    )


def _claim_words(setting: Setting) -> str:
    match setting.participation.name:
        case "POISSON" if setting.mechanism in (Mechanism.TREE_AGGREGATION, Mechanism.ADAPTIVE_TREE):
            return "if every device takes part once in all rounds together (what the task builder reports)"
        case "POISSON":
            return "if every round is a random sample of the devices (Poisson; what the task builder reports)"
        case "FIXED_SIZE":
            return f"if every round is a random sample of exactly {setting.report_goal:,} devices (replace-one)"
        case "MIN_SEPARATION":
            return _separation_words(setting)
    return "for a device that takes part in every round: nothing is assumed about when devices come"


def _separation_words(setting: Setting) -> str:
    times = _participations(setting)
    return f"for a device that takes part in {times:,} round{'s' * (times != 1)}, whenever minimum separation lets it"


def _participations(setting: Setting) -> int:
    return -(-setting.rounds // max(1, setting.minimum_separation))


def _warning(setting: Setting, claimed: float, whole: float) -> str | None:
    if setting.noise_multiplier == 0:
        return "without noise there is no promise at all"
    if math.isinf(claimed):
        return f"no epsilon is proven at delta {setting.delta:g}: there is no promise at all"
    if whole <= _NOTABLE * claimed:
        return None
    factor = f"{float(f'{whole / claimed:.2g}'):,g} times" if claimed and math.isfinite(whole) else "far"
    if setting.participation.name == "MIN_SEPARATION":
        return f"epsilon is {factor} larger for a device that does not keep the minimum separation"
    return (
        f"epsilon is {factor} larger if the assumption does not hold; devices that come when they like are no random "
        "sample, and only the separation that devices enforce can be relied on"
    )


@contextmanager
def _accounted() -> Iterator[None]:
    """Whatever numbers an accountant cannot take, it is the setting that is told."""
    try:
        yield
    except (ArithmeticError, ValueError, MemoryError) as error:
        raise _invalid(f"no accountant takes these numbers: {error}") from error


def _invalid(detail: str) -> OperationFailed:
    return OperationFailed(Reason.SETTINGS_INVALID, detail, remedy="see --help of this command for an example")
