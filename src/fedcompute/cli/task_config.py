"""`fedcompute task init` and `fedcompute task validate`: a configuration to start from, and what is wrong with one."""

import json
import math
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.errors import OperationFailed, Reason

if TYPE_CHECKING:
    from fedcompute.builder.dp_types import DpParameters
    from fedcompute.builder.problem import Problem
    from fedcompute.builder.validation import BuildSettings
    from fedcompute.privacy.bounds import Bounds

# Seconds in which an exact epsilon is worth waiting for.
_PATIENCE = 1.5


class Mode(StrEnum):
    """What a configuration builds, as the command line says it."""

    TRAINING_ONLY = "training_only"
    TRAINING_AND_EVAL = "training_and_eval"
    EVAL_ONLY = "eval_only"


def init(
    file: Annotated[Path, typer.Argument(help="File to write; it must not exist.")] = Path("task_config.pbtxt"),
    mode: Annotated[Mode, typer.Option(case_sensitive=False, help="The tasks to build.")] = Mode.TRAINING_AND_EVAL,
    population: Annotated[str, typer.Option(help="Name of the population.")] = "my_population",
    label_name: Annotated[
        str, typer.Option("--label-name", help="Name of the label, for models with a dictionary of features.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 1000,
    report_goal: Annotated[int, typer.Option("--report-goal", min=1, help="Devices per round.")] = 500,
) -> None:
    """Write a commented task configuration to start from."""
    from fedcompute.builder.sample_config import sample_config
    from fedcompute.protos import task_builder_pb2

    text = sample_config(
        task_builder_pb2.TaskMode.Enum.Value(mode.name),
        population=population,
        label_name=label_name,
        rounds=rounds,
        report_goal=report_goal,
        file=str(file),
    )
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"{file} exists and is left as it is", remedy="name another file, or remove it"
        ) from None
    typer.echo(f"{file} is written; change it, then check it with: fedcompute task validate {file}")


def validate(
    file: Annotated[
        Path, typer.Argument(help="Configuration, in text format or JSON, or a zip archive with one beside a model.")
    ],
    skip_dp_check: Annotated[
        bool, typer.Option("--skip-dp-check", help="Accept an epsilon above the target; it is shown all the same.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check a task configuration without building it: every problem with its field, value, rule and remedy.

    The exit code is 1 if there is a problem. Epsilon is checked by proven bounds and shown exactly where that takes a
    moment; calibrating noise may take a minute.
    """
    from fedcompute.builder.client import load_config
    from fedcompute.builder.differential_privacy import account, check_dp, dp_notes
    from fedcompute.builder.problem import ConfigProblems
    from fedcompute.builder.validation import validate as check
    from fedcompute.protos import task_builder_pb2

    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=skip_dp_check)
    problems: tuple[Problem, ...] = ()
    warnings: list[str] = []
    lines: dict[str, int] = {}
    settings = dp = bounds = None
    try:
        loaded = load_config(str(file))
        warnings += loaded.warnings
        lines.update(loaded.lines)
        settings = check(loaded.config, flags)
        warnings += settings.warnings
        with _status(quiet=as_json):
            accounting = account(settings)
            if not skip_dp_check:
                check_dp(accounting)
            dp, bounds = accounting.known(_PATIENCE)
            warnings += dp_notes(settings, dp)
    except ConfigProblems as error:
        problems = error.problems
    if as_json:
        typer.echo(json.dumps(_document(problems, warnings, lines, settings, dp, bounds)))
    else:
        _print(file, problems, warnings, lines, settings, dp, bounds)
    if problems:
        raise typer.Exit(1)


def _status(*, quiet: bool) -> Any:
    if quiet:
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status("computing epsilon ...")


def _line(problem: "Problem", lines: dict[str, int]) -> int | None:
    """The line of the field, or of the nearest block around it that is written; None if there is none."""
    path = problem.path
    while path and path not in lines:
        path = path.rpartition(".")[0]
    return problem.line or lines.get(path)


def _document(
    problems: "tuple[Problem, ...]",
    warnings: list[str],
    lines: dict[str, int],
    settings: "BuildSettings | None",
    dp: "DpParameters | None",
    bounds: "Bounds | None",
) -> dict[str, Any]:
    from fedcompute.protos import task_builder_pb2

    document: dict[str, Any] = {
        "valid": not problems,
        "problems": [
            {
                "path": problem.path,
                "line": _line(problem, lines),
                "value": problem.value,
                "rule": problem.rule,
                "remedy": problem.remedy,
                "message": problem.message,
            }
            for problem in problems
        ],
        "warnings": warnings,
    }
    if settings is not None:
        document["mode"] = task_builder_pb2.TaskMode.Enum.Name(settings.mode)
        document["population"] = settings.population
    if dp is not None and bounds is not None:
        document["differential_privacy"] = {
            "type": task_builder_pb2.DpAggregator.Enum.Name(dp.type),
            "clip_norm": dp.clip_norm,
            "noise_multiplier": dp.noise_multiplier,
            # The upper one of the bounds where the exact value takes longer; null where there is none.
            "epsilon": _finite(dp.epsilon),
            "epsilon_bounds": [_finite(bounds.lower), _finite(bounds.upper)],
            "participation": dp.participation.name,
            "delta": dp.delta,
            "rounds": dp.rounds,
        }
    return document


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print(
    file: Path,
    problems: "tuple[Problem, ...]",
    warnings: list[str],
    lines: dict[str, int],
    settings: "BuildSettings | None",
    dp: "DpParameters | None",
    bounds: "Bounds | None",
) -> None:
    from fedcompute.protos import task_builder_pb2

    for warning in warnings:
        typer.echo(f"note: {warning}")
    for problem in problems:
        line = _line(problem, lines)
        typer.echo(f"{file}:{line}: {problem.path}" if line else f"{file}: {problem.path}")
        if problem.value:
            typer.echo(f"  value:  {problem.value}")
        typer.echo(f"  rule:   {problem.rule}\n  remedy: {problem.remedy}")
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        typer.echo(f"{file} has {count}")
        return
    assert settings is not None, "without a problem the configuration has been read"
    assert dp is not None, "and its privacy computed"
    assert bounds is not None, "with bounds"
    mode = task_builder_pb2.TaskMode.Enum.Name(settings.mode)
    epsilon = f"epsilon {dp.epsilon:.4g}"
    if f"{bounds.lower:.4g}" != f"{bounds.upper:.4g}":
        epsilon = f"epsilon between {bounds.lower:.4g} and {bounds.upper:.4g}"
    typer.echo(
        f"{file} is valid: {mode} for population {settings.population}, {dp.rounds} rounds, {epsilon} "
        f"at delta {dp.delta:.3g} with noise multiplier {dp.noise_multiplier:.6g}"
    )
