"""`fedcompute privacy`: accounting at the prompt."""

import json
import math
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.errors import OperationFailed, Reason

DEFAULT_DEVICES = 1_000_000

app = typer.Typer(no_args_is_help=True, help="Epsilon, noise and what a task has spent.")

_Rounds = Annotated[int, typer.Option(min=1, help="Training rounds, each of them one release.")]
_ReportGoal = Annotated[int, typer.Option(min=1, help="Devices per round.")]
_Devices = Annotated[
    int, typer.Option("--devices", "--estimated-population", min=1, help="Devices that rounds are drawn from.")
]
_Delta = Annotated[
    float | None, typer.Option(help="Probability that the promise may fail.", show_default="1 over --devices")
]
_Separation = Annotated[
    int, typer.Option("--minimum-separation", min=0, help="A device takes part at most once in this many rounds.")
]


@app.command(
    epilog="Example: fedcompute privacy epsilon --noise-multiplier 1 --rounds 1000 --report-goal 2000 --devices 1000000"
)
def epsilon(
    noise_multiplier: Annotated[float, typer.Option(min=0.0, help="Noise standard deviation over clip norm.")],
    rounds: _Rounds,
    report_goal: _ReportGoal,
    devices: _Devices = DEFAULT_DEVICES,
    delta: _Delta = None,
    minimum_separation: _Separation = 0,
    as_json: options.AsJson = False,
) -> None:
    """Epsilon of a fixed Gaussian task: as the task builder claims it, and without assuming random sampling."""
    found = _figures(noise_multiplier, rounds, report_goal, devices, delta, minimum_separation)
    _print_figures(found, as_json=as_json)


@app.command(
    epilog="Example: fedcompute privacy noise --target-epsilon 10 --rounds 1000 --report-goal 2000 --devices 1000000"
)
def noise(
    target_epsilon: Annotated[float, typer.Option(help="Epsilon that must not be exceeded; greater than 0.")],
    rounds: _Rounds,
    report_goal: _ReportGoal,
    devices: _Devices = DEFAULT_DEVICES,
    delta: _Delta = None,
    minimum_separation: _Separation = 0,
    as_json: options.AsJson = False,
) -> None:
    """The smallest noise multiplier that keeps to a target epsilon, by the task builder's accounting."""
    from fedcompute.privacy.accounting import calibrate_noise

    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise _invalid(f"--target-epsilon: {target_epsilon:g} is not greater than 0")
    failure = _delta(delta, devices)
    multiplier = calibrate_noise(target_epsilon, rounds, _probability(report_goal, devices), failure)
    _print_figures(_figures(multiplier, rounds, report_goal, devices, failure, minimum_separation), as_json=as_json)


@app.command(epilog="Example: fedcompute privacy report --population my_population --task-id 1 --devices 100000")
def report(
    population: options.Population,
    task_id: options.TaskId = 1,
    server: options.Server = options.DEFAULT_SERVER,
    devices: _Devices = DEFAULT_DEVICES,
    delta: _Delta = None,
    as_json: options.AsJson = False,
) -> None:
    """What a task has spent so far, recomputed from the server's ledger of releases."""
    from fedcompute.monitoring.operator_api import OperatorApi
    from fedcompute.privacy.ledger import read_events
    from fedcompute.privacy.report import privacy_report, privacy_sentences

    view = OperatorApi(server).task(population, task_id)
    entries = view["ledger"]
    if not entries:
        done = any(one["completed"] for one in view["iterations"])
        text = (
            "No release in the ledger: the task evaluates, or it was built without noise and promises nothing."
            if done
            else "Nothing is spent: no round has completed."
        )
        typer.echo(json.dumps({"releases": 0, "sentences": [text]}) if as_json else text)
        return
    found = privacy_report(
        [read_events(entry["event"]) for entry in entries],
        clip_norm=max(float(entry["clip_norm"]) for entry in entries),
        report_goal=min(int(entry["report_goal"]) for entry in entries),
        population=devices,
        delta=_delta(delta, devices),
        minimum_separation=_minimum_separation(view),
    )
    sentences = privacy_sentences(found)
    if as_json:
        typer.echo(json.dumps({"releases": len(entries), **_finite(asdict(found)), "sentences": sentences}))
        return
    typer.echo(f"task {population}/{task_id}, {len(entries)} releases, {devices:,} devices assumed")
    for sentence in sentences:
        typer.echo(f"  {sentence}")


def _figures(
    multiplier: float, rounds: int, report_goal: int, devices: int, delta: float | None, separation: int
) -> dict[str, Any]:
    from fedcompute.privacy.accounting import gaussian_epsilon, poisson_epsilon
    from fedcompute.privacy.ledger import GaussianEvent, composed_noise_multiplier

    failure = _delta(delta, devices)
    participations = math.ceil(rounds / max(1, separation))
    composed = composed_noise_multiplier([GaussianEvent(multiplier)] * participations)
    return {
        "noise_multiplier": multiplier,
        "rounds": rounds,
        "report_goal": report_goal,
        "devices": devices,
        "delta": failure,
        "sampled_epsilon": poisson_epsilon(multiplier, rounds, _probability(report_goal, devices), failure),
        "participations": participations,
        "epsilon": gaussian_epsilon(composed, failure),
    }


def _print_figures(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_finite(found)))
        return
    typer.echo(
        f"noise multiplier {found['noise_multiplier']:.6g}, {found['rounds']} rounds of {found['report_goal']} out of "
        f"{found['devices']:,} devices, delta {found['delta']:g}\n"
        f"  epsilon {found['sampled_epsilon']:.4g}  if every round were a random sample of the devices "
        "(what the task builder reports)\n"
        f"  epsilon {found['epsilon']:.4g}  for a device that takes part in {found['participations']} rounds, "
        "whoever decides when"
    )


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity.
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}


def _probability(report_goal: int, devices: int) -> float:
    if report_goal > devices:
        raise _invalid(f"--report-goal: {report_goal} of {devices} devices")
    return report_goal / devices


def _delta(delta: float | None, devices: int) -> float:
    if delta is None:
        return 1 / max(devices, 2)
    if not 0 < delta < 1:
        raise _invalid(f"--delta: {delta:g} does not lie between 0 and 1")
    return delta


def _minimum_separation(view: dict[str, Any]) -> int:
    info = view["task"].get("info", {}).get("training_info", {}).get("eligibility_task_info", {})
    policies = [one.get("min_sep_policy", {}) for one in info.get("eligibility_policies", [])]
    return max((int(policy.get("minimum_separation", 0)) for policy in policies), default=0)


def _invalid(detail: str) -> OperationFailed:
    return OperationFailed(Reason.SETTINGS_INVALID, detail, remedy="see --help of this command for an example")
