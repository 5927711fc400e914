"""`fedcompute simulate`: a task's rounds in memory, one run or a sweep over settings."""

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.cli.options import Workers
from fedcompute.errors import OperationFailed, Reason
from fedcompute.models.quiet import quiet_tensorflow

if TYPE_CHECKING:
    from fedcompute.fleet.simulation.jobs import RoundFacts, RunJob, RunResult
    from fedcompute.server.executors import Executor

_TRAINING, _EVALUATION = "server/client_work/train/", "server/eval/"
_RESULT = "simulation.json"


def simulate(
    config: Annotated[Path, typer.Argument(help="Task configuration: text format or JSON, whatever its name.")],
    model: Annotated[str, typer.Option(help="SavedModel directory, a zip archive of one, or a sample's name.")],
    data: Annotated[
        str,
        typer.Option(
            help="digits, a directory of IDX files, a federated EMNIST .h5 file, or a directory with a TFRecord file "
            "of examples for each client."
        ),
    ] = "digits",
    clients: Annotated[int, typer.Option(min=1, help="Clients that the data are divided among.")] = 1000,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to run; unset: all that the task has.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=V,V", help="Run every value of a field, or of the seed; several are combined."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides who has which data, initial weights, cohorts and noise.")] = 0,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Rounds between looks at the held-out examples.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Clients that train at a time; default: cores.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Workers that share the work: processes here, or on the nodes of a Ray cluster.")
    ] = 1,
    executor: Annotated[Workers, typer.Option(help="Where the workers are.")] = Workers.PROCESSES,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a Ray cluster's head, whose nodes see model and data under the same paths; default: a "
            "Ray of this machine alone."
        ),
    ] = None,
    skip_dp_check: Annotated[
        bool, typer.Option("--skip-dp-check", help="Accept an epsilon above the target; it is reported all the same.")
    ] = False,
    skip_dp_aggregator: Annotated[
        bool, typer.Option("--skip-dp-aggregator", help="No clipping and no noise: no privacy promise at all.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for a PNG per metric with every run in it, and all numbers as JSON.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Run a task's rounds in memory, with the learning and privacy code of a server and no devices.

    For choosing settings before devices are involved: rounds on the same clients are those of a server.
    """
    from fedcompute.builder.client import load_config
    from fedcompute.fleet.simulation.jobs import RunJob, Setup
    from fedcompute.fleet.simulation.sweeps import read_sweep, variants
    from fedcompute.protos import task_builder_pb2

    loaded = load_config(str(config))
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=skip_dp_check, skip_dp_aggregator=skip_dp_aggregator)
    # What the builder has to say comes at the end, as notes.
    logging.getLogger("fedcompute.builder").setLevel(logging.ERROR)
    with quiet_tensorflow():
        from fedcompute.fleet.simulation.local_training import pin_threads

        pin_threads(threads or _cores())
    setup = Setup(loaded.config.SerializeToString(), flags.SerializeToString(), model, data, clients, seed)
    sweeps = [read_sweep(text) for text in sweep or ()]
    runs = variants(setup, sweeps)
    jobs = [(one.label, RunJob(one.setup, rounds, evaluate_every, threads)) for one in runs]
    with _workers(processes, executor, ray_address) as workers:
        if len(jobs) == 1:
            results = [_one(jobs[0][1], workers, quiet=as_json)]
        else:
            results = _several(jobs, workers, quiet=as_json)
    labels = [label for label, _ in jobs]
    files = [] if out is None else _write(out, labels, results)
    warnings = list(dict.fromkeys([*loaded.warnings, *(text for one in results for text in one.warnings)]))
    if as_json:
        typer.echo(
            json.dumps({**_document(labels, results), "warnings": warnings, "files": [str(one) for one in files]})
        )
        return
    for text in warnings:
        typer.echo(f"note: {text}")
    if len(results) > 1:
        _print_comparison([one.values for one in runs], results)
    else:
        _print_summary(results[0])
    for file in files:
        typer.echo(str(file))


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def _workers(processes: int, kind: Workers, ray_address: str | None) -> "AbstractContextManager[Executor | None]":
    """None where the threads of this process do the work."""
    if processes == 1 and kind is Workers.PROCESSES and ray_address is None:
        return nullcontext()
    from fedcompute.server.executors import open_executor

    return closing(open_executor(kind.value, ray_address, processes))


def _one(job: "RunJob", executor: "Executor | None", *, quiet: bool) -> "RunResult":
    from fedcompute.fleet.simulation.runs import run

    shown = _Rounds(job.every, quiet=quiet)
    with quiet_tensorflow() if quiet else nullcontext():
        return run(job, shown, executor)


def _several(jobs: "Sequence[tuple[str, RunJob]]", executor: "Executor | None", *, quiet: bool) -> "list[RunResult]":
    from fedcompute.fleet.simulation.jobs import run_in_worker
    from fedcompute.fleet.simulation.runs import run

    results = []
    futures = [] if executor is None else [executor.submit(run_in_worker, job) for _, job in jobs]
    for number, (label, job) in enumerate(jobs):
        result = futures[number].result() if futures else run(job, lambda _: None)
        results.append(result)
        if not quiet:
            typer.echo(f"run {number + 1} of {len(jobs)}  {label}:  {_facts(result.rounds[-1].metrics)}")
    return results


class _Rounds:
    """Prints a line for each round that was measured."""

    def __init__(self, every: int, *, quiet: bool) -> None:
        self._every, self._quiet = every, quiet

    def __call__(self, one: "RoundFacts") -> None:
        if self._quiet or one.number % self._every:
            return
        rejected = f"  rejected {sum(one.rejected.values())}" if one.rejected else ""
        took = f"{one.seconds:.3f} s" if one.number else "untrained"
        typer.echo(f"round {one.number:4}  {took:>9}  {_facts(one.metrics)}{rejected}")


def _facts(metrics: Mapping[str, float]) -> str:
    """Metrics in words: those of held-out examples, and those that devices measured while they trained."""
    parts = []
    for prefix, name in ((_EVALUATION, "held out"), (_TRAINING, "training")):
        found = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        if found:
            parts.append(f"{name}: " + ", ".join(f"{key} {_number(value)}" for key, value in found.items()))
    return "   ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _print_summary(result: "RunResult") -> None:
    trained = [one for one in result.rounds if one.number]
    typer.echo(
        f"{len(trained)} rounds of {trained[-1].contributions} clients, {_seconds(result):.4f} s a round (median; the "
        f"first {trained[0].seconds:.2f} s)"
    )
    typer.echo(_epsilon(result))


def _print_comparison(swept: Sequence[Mapping[str, str]], results: "Sequence[RunResult]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for one in results for name in one.rounds[-1].metrics if _is_shown(name)))
    for name in (*swept[0], *map(_short, names), "epsilon", "s/round"):
        table.add_column(name.replace("_", " "), justify="right")
    for values, one in zip(swept, results, strict=True):
        last = one.rounds[-1].metrics
        epsilon = "-" if one.epsilon is None else f"{one.epsilon:.4g}"
        table.add_row(*values.values(), *(_number(last.get(name)) for name in names), epsilon, f"{_seconds(one):.4f}")
    Console().print(table)


def _is_shown(name: str) -> bool:
    return name.startswith((_EVALUATION, _TRAINING))


def _short(name: str) -> str:
    where = "held-out" if name.startswith(_EVALUATION) else "training"
    return f"{where} {name.removeprefix(_EVALUATION).removeprefix(_TRAINING)}"


def _seconds(result: "RunResult") -> float:
    # The first round traces and compiles.
    trained = [one.seconds for one in result.rounds if one.number]
    return statistics.median(trained[1:] or trained)


def _epsilon(result: "RunResult") -> str:
    if result.epsilon is None:
        return "no differential privacy: nothing was clipped or noised"
    return f"a task that runs so spends epsilon {result.epsilon:.4g} at delta {result.delta:g}"


def _document(labels: Sequence[str], results: "Sequence[RunResult]") -> dict[str, Any]:
    return {
        "runs": [
            {
                "label": label,
                "epsilon": None if one.epsilon is None or math.isinf(one.epsilon) else one.epsilon,
                "delta": one.delta,
                "seconds_per_round": _seconds(one),
                "rounds": [_finite(asdict(facts)) for facts in one.rounds],
            }
            for label, one in zip(labels, results, strict=True)
        ]
    }


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    values = {name: value if math.isfinite(value) else None for name, value in facts["metrics"].items()}
    return {**facts, "metrics": values}


def _write(out: Path, labels: Sequence[str], results: "Sequence[RunResult]") -> list[Path]:
    from fedcompute.monitoring.frames import series
    from fedcompute.monitoring.plots import Run, plot_metrics

    drawn = []
    for label, one in zip(labels, results, strict=True):
        metrics = {facts.number: facts.metrics for facts in one.rounds}
        found = {name: line for name, line in series(metrics).items() if _is_shown(name)}
        drawn.append(Run(label or "simulation", found))
    files = plot_metrics(drawn, out, bridged=True)
    result = out / _RESULT
    try:
        result.write_text(json.dumps(_document(labels, results)))
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"{result.name} cannot be written: {error.strerror}", remedy="choose another --out"
        ) from error
    return [*files, result]
