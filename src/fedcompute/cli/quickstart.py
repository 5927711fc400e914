"""`fedcompute quickstart`: build, serve, train on simulated devices, evaluate, plot; every part the real one."""

import contextlib
import itertools
import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedcompute.cli.progress import DeviceLine
from fedcompute.cli.sample_task import (
    POPULATION,
    BuiltSample,
    Judged,
    SampleTask,
    build_sample,
    judge_sample,
)
from fedcompute.errors import OperationFailed, Reason
from fedcompute.models.zoo import DEFAULT_MODEL, SAMPLE_MODELS
from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.settings import RetryWindow, Settings

DEFAULT_DEVICES = 40
DEFAULT_ROUNDS = 20
DEFAULT_NOISE = 0.5
_SOON = RetryWindow(0.2, 1.0)
_POLL_SECONDS = 0.25
_OPEN_SECONDS = 60.0
# Without any contribution for this long something is wrong, and waiting longer helps nobody.
_STALLED_SECONDS = 180.0
_ACCURACY = "sparse_categorical_accuracy"


def quickstart(
    model: Annotated[
        str, typer.Option(help="One of: " + ", ".join(name for name in SAMPLE_MODELS if "dense-784" not in name) + ".")
    ] = DEFAULT_MODEL,
    devices: Annotated[int, typer.Option(min=20, max=10_000, help="Simulated devices.")] = DEFAULT_DEVICES,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Training rounds.")] = DEFAULT_ROUNDS,
    noise_multiplier: Annotated[
        float, typer.Option(min=0.0, help="DP noise over clip norm; 0 builds with skip_dp_aggregator.")
    ] = DEFAULT_NOISE,
    data: Annotated[
        str, typer.Option(help="digits, a directory of IDX files (MNIST), or a federated EMNIST .h5 file.")
    ] = "digits",
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Keep the server up at the end, until Ctrl-C.")
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option(help="Where everything goes.", show_default="fedcompute-data/quickstart-TIME"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the server; 0 for any free one.")] = 0,
) -> None:
    """Train a model on real handwriting with simulated devices, under differential privacy, in a few minutes.

    Builds a training and an evaluation task, serves them, runs the devices over HTTP, and shows what was learnt and
    what it cost in privacy. Nothing leaves this machine.

    Example: fedcompute quickstart --model emnist-cnn --noise-multiplier 0
    """
    console = Console(highlight=False, soft_wrap=True)
    if model not in SAMPLE_MODELS or model.startswith("dense-784"):
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"--model: no model {model!r}", remedy="see fedcompute quickstart --help"
        )
    root = own_directory(directory)
    task = SampleTask(root / "model", model, data, devices, rounds, noise_multiplier)
    # Whoever stops it politely gets the same orderly end as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _run(console, task, root, port, keep_serving=keep_serving)
    except KeyboardInterrupt:
        console.print(f"\nStopped. Go on with:  fedcompute server --data-dir {shlex.quote(str(root))}")
        raise typer.Exit(130) from None


def own_directory(wanted: Path | None) -> Path:
    """Makes the run's directory, which no other run has; raises OperationFailed(SETTINGS_INVALID) or OSError."""
    if wanted is not None:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise OperationFailed(
                Reason.SETTINGS_INVALID, f"--directory: {wanted} is not empty", remedy="choose another, or remove it"
            )
        return wanted
    name = f"quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        root = Path("fedcompute-data") / (name if number == 1 else f"{name}-{number}")
        # Two runs that start in the same second must not share one.
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700, parents=True)
            break
    return root


def _run(console: Console, task: SampleTask, root: Path, port: int, *, keep_serving: bool) -> None:
    from fedcompute.server.listening import listen

    start = time.monotonic()
    workshop = ProcessExecutor(1)
    try:
        listener = listen(Settings.host, port)
        settings = Settings(
            data_dir=root,
            port=listener.getsockname()[1],
            retry_no_task=_SOON,
            retry_no_active_task=_SOON,
            workers=1,
        )
        noise = f"noise multiplier {task.noise_multiplier:g}" if task.noise_multiplier else "no noise"
        console.print(
            f"[bold]fedcompute quickstart[/]  {task.model}, {task.devices} devices, {task.rounds} rounds, {noise}"
        )
        with console.status("building a training and an evaluation task ..."):
            sample: BuiltSample = _result(workshop.submit(build_sample, task))
        console.print(
            f"[bold]Built[/]    {sample.parameters:,} parameters, {sample.images:,} handwritten digits on "
            f"{task.devices} devices, {sample.test_images:,} held out  ({time.monotonic() - start:.1f} s)"
        )
        for warning in sample.warnings:
            console.print(f"         [dim]note: {warning}[/]")
        with serving(settings, listener):
            tasks = register(settings, sample)
            console.print(
                f"[bold]Serving[/]  {settings.base_url}  training task {tasks[0]}, evaluation task {tasks[1]}\n"
                f"[bold]Watch[/]    {settings.base_url}/tasks/{POPULATION}/{tasks[0]}"
            )
            _train(console, settings, task, tasks, root)
            _conclude(console, workshop, settings, task, tasks, sample, root)
            print_commands(console, root, settings.base_url if keep_serving else None)
            console.print(f"[dim]{time.monotonic() - start:.0f} s in all[/]")
            if keep_serving:
                console.print(f"\nServing on {settings.base_url} until Ctrl-C.")
                threading.Event().wait()
    finally:
        workshop.close()


def _result(future: Any) -> Any:
    # In short waits, so that Ctrl-C is seen at once.
    while True:
        try:
            return future.result(timeout=0.2)
        except TimeoutError:
            if future.done():
                raise


@contextmanager
def serving(settings: Settings, listener: Any) -> Iterator[None]:
    """The server of `settings` on a thread of this process, for as long as the block runs."""
    import logging

    from fedcompute.app import server

    logging.basicConfig(
        filename=settings.data_dir / "server.log",
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    running = server(settings)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
    thread.start()
    try:
        while not running.started:
            if not thread.is_alive():
                raise OperationFailed(
                    Reason.INTERNAL, "the server did not start", remedy=f"read {settings.data_dir / 'server.log'}"
                )
            time.sleep(0.02)
        yield
    finally:
        running.should_exit = True
        thread.join(30)


def register(settings: Settings, sample: BuiltSample) -> tuple[int, int]:
    """Creates both tasks over HTTP and waits until they are open."""
    from fedcompute.builder.artifacts import BuiltGroup, BuiltTask
    from fedcompute.builder.task_management import register_group
    from fedcompute.protos import task_builder_pb2, task_pb2

    def built(parts: tuple[bytes, bytes, bytes, bytes]) -> BuiltTask:
        return BuiltTask(task_pb2.Task.FromString(parts[0]), *parts[1:])

    group = BuiltGroup(built(sample.training), built(sample.evaluation), task_builder_pb2.TaskReport())
    created = register_group(settings.base_url, group)
    tasks = created.training_task.task_id, created.eval_task.task_id
    deadline = time.monotonic() + _OPEN_SECONDS
    api = _api(settings)
    while any(api.task(POPULATION, task_id)["task"]["status"] != "OPEN" for task_id in tasks):
        if time.monotonic() > deadline:
            raise OperationFailed(Reason.INTERNAL, f"the tasks did not open within {_OPEN_SECONDS:.0f} s")
        time.sleep(0.05)
    return tasks


def _api(settings: Settings) -> Any:
    from fedcompute.monitoring.operator_api import OperatorApi

    return OperatorApi(settings.base_url)


def _train(console: Console, settings: Settings, task: SampleTask, tasks: tuple[int, int], root: Path) -> None:
    """Runs the fleet until the training task has completed, printing one line a round."""
    from fedcompute.fleet.processes import Fleet
    from fedcompute.fleet.settings import FleetSettings

    api = _api(settings)
    fleet_settings = FleetSettings(
        server_url=settings.base_url, population=POPULATION, devices=task.devices, data=task.data, seed=task.seed
    )
    console.print(f"\n{'round':>10} {'accuracy':>8} {'loss':>7} {'contributions':>13} {'rejected':>8} {'seconds':>7}")
    shown: set[tuple[int, int]] = set()
    last_change, contributions = time.monotonic(), 0
    with Fleet(fleet_settings, root / "fleet.log") as fleet, DeviceLine(console) as line:
        while True:
            fleet.check()
            training, evaluation = (api.task(POPULATION, task_id) for task_id in tasks)
            for task_id, view in zip(tasks, (training, evaluation), strict=True):
                _print_rounds(console, view, task_id, shown)
            status = training["task"]["status"]
            if status == "COMPLETED":
                return
            if status not in ("OPEN", "PAUSED"):
                failure = training["failure"] or {}
                raise OperationFailed(
                    Reason.INTERNAL, f"the training task is {status}: {failure.get('message', 'no reason given')}"
                )
            if fleet.progress.contributions != contributions:
                last_change, contributions = time.monotonic(), fleet.progress.contributions
            if time.monotonic() - last_change > _STALLED_SECONDS:
                raise OperationFailed(
                    Reason.INTERNAL,
                    f"no device has contributed for {_STALLED_SECONDS:.0f} s",
                    remedy=f"read {root / 'fleet.log'} and {root / 'server.log'}",
                )
            current = training["iterations"][-1]["iteration_id"] if training["iterations"] else 0
            line.show(f"round {current} of {task.rounds}", fleet.progress.by_state())
            time.sleep(_POLL_SECONDS)


def _print_rounds(console: Console, view: Mapping[str, Any], task_id: int, shown: set[tuple[int, int]]) -> None:
    metrics: dict[int, dict[str, float]] = {}
    for metric in view["metrics"]:
        metrics.setdefault(metric["iteration_id"], {})[metric["name"].rpartition("/")[2]] = metric["value"]
    for one in view["iterations"]:
        number = one["iteration_id"]
        if one["completed"] is None or (task_id, number) in shown:
            continue
        shown.add((task_id, number))
        values = metrics.get(number, {})
        seconds = (datetime.fromisoformat(one["completed"]) - datetime.fromisoformat(one["opened"])).total_seconds()
        evaluated = one["evaluated_iteration_id"]
        name = f"eval of {evaluated}" if evaluated is not None else str(number)
        line = (
            f"{name:>10} {_number(values.get(_ACCURACY), '8.3f')} {_number(values.get('loss'), '7.3f')} "
            f"{one['assignments'].get('UPLOAD_COMPLETED', 0):>13} {one['assignments'].get('REMOTE_FAILED', 0):>8} "
            f"{seconds:7.1f}"
        )
        console.print(line, style="dim" if evaluated is not None else "")


def _number(value: float | None, form: str) -> str:
    return " " * (int(form.partition(".")[0]) - 1) + "-" if value is None else f"{value:{form}}"


def _conclude(
    console: Console,
    workshop: ProcessExecutor,
    settings: Settings,
    task: SampleTask,
    tasks: tuple[int, int],
    sample: BuiltSample,
    root: Path,
) -> None:
    """Judges and exports the trained model, draws the plots, and says what was learnt, spent and left behind."""
    from fedcompute.monitoring.frames import read_series
    from fedcompute.monitoring.plots import Run, learning_curve, plot_metrics

    api = _api(settings)
    # The evaluation would go on for as many rounds as the training had; its devices have gone.
    api.cancel(POPULATION, tasks[1])
    with console.status("judging the trained model on the held-out digits ..."):
        judged: Judged = _result(workshop.submit(judge_sample, (task, api.checkpoint(POPULATION, tasks[0])[0])))
    view = api.task(POPULATION, tasks[0])
    evaluation = api.task(POPULATION, tasks[1])
    measured = {one["iteration_id"]: one["evaluated_iteration_id"] for one in evaluation["iterations"]}
    training_series = read_series(root, POPULATION, tasks[0])
    evaluation_series = read_series(root, POPULATION, tasks[1]) if evaluation["metrics"] else {}
    plots = root / "plots"
    curve = learning_curve(
        training_series,
        {name: series.at(measured) for name, series in evaluation_series.items()},
        plots / "learning_curve.png",
        title=f"{task.model}: {task.devices} devices, {task.rounds} rounds",
    )
    plot_metrics([Run("training", training_series)], plots)
    console.print(
        f"\n[bold]Learnt[/]   held-out accuracy {sample.accuracy:.3f} before, [bold green]{judged.accuracy:.3f}[/] "
        f"after; loss {sample.loss:.3f} before, {judged.loss:.3f} after"
    )
    _print_privacy(console, view["ledger"], task)
    _print_places(console, root, task, tasks, judged, curve, _write_privacy_page(api, tasks, root))


def _print_privacy(console: Console, ledger: list[dict[str, Any]], task: SampleTask) -> None:
    from fedcompute.privacy.ledger import read_events
    from fedcompute.privacy.participation import Assumption, Participation
    from fedcompute.privacy.report import privacy_report, privacy_sentences

    if not ledger:
        console.print(
            "[bold]Privacy[/]  built with skip_dp_aggregator: no clipping, no noise, no privacy promise at all"
        )
        return
    goal = int(ledger[0]["report_goal"])
    rounds = {int(entry["iteration_id"]): read_events(entry["event"]) for entry in ledger}
    report = privacy_report(
        [rounds.get(iteration, []) for iteration in range(1, max(rounds) + 1)],
        Assumption(Participation.POISSON, task.devices, goal, task.minimum_separation),
        clip_norm=float(ledger[0]["clip_norm"]),
        delta=task.dp_delta,
    )
    # Few devices come often: what needs no assumption on when is the figure to show first.
    honest = report.unamplified_epsilon if report.separated_epsilon is None else report.separated_epsilon
    spent = "infinite" if math.isinf(honest) else f"{honest:.2f}"
    console.print(
        f"[bold]Privacy[/]  epsilon [bold]{spent}[/] at delta {report.delta:g}  (fixed Gaussian, noise multiplier "
        f"{report.noise_multiplier:g}, clip norm {report.clip_norm:g}, {report.rounds} rounds of {goal})"
    )
    for sentence in privacy_sentences(report):
        console.print(f"         [dim]{sentence}[/]")


def _write_privacy_page(api: Any, tasks: tuple[int, int], root: Path) -> Path:
    from fedcompute.cli.privacy_report import write_page
    from fedcompute.monitoring.plan_facts import plan_facts
    from fedcompute.monitoring.task_privacy import task_privacy
    from fedcompute.privacy.ledger_document import ledger_from

    ledger = ledger_from(api.ledger(POPULATION))
    found = task_privacy(ledger, tasks[0], facts=plan_facts(api, POPULATION, tasks[0], tasks))
    return write_page(found, root / "privacy_report.html")


def _print_places(
    console: Console, root: Path, task: SampleTask, tasks: tuple[int, int], judged: Judged, curve: Path, page: Path
) -> None:
    blobs = root / "blobs" / "model" / POPULATION / str(tasks[0])
    console.print(
        f"[bold]Files[/]    learning curve      {curve}\n"
        f"         plots by metric     {curve.parent}\n"
        f"         privacy report      {page}\n"
        f"         trained model       {judged.keras_file}  and  {judged.saved_model}\n"
        f"         checkpoint, round N {blobs}/N/s/0/checkpoint\n"
        f"         metrics, round N    {blobs}/N/s/0/metrics\n"
        f"         configuration       {task.config}\n"
        f"         logs                {root / 'server.log'}, {root / 'fleet.log'}"
    )


def print_commands(console: Console, root: Path, url: str | None) -> None:
    """What to type next; `url`: of the server that goes on, None if it ends here."""
    there = shlex.quote(str(root))
    serve = [] if url else [(f"fedcompute server --data-dir {there}", "serve what is here again, then:")]
    server = f" --server {url}" if url else ""
    commands = [
        *serve,
        (f"fedcompute task list{server}", ""),
        (f"fedcompute task show{server} --population {POPULATION}", ""),
        (f"fedcompute metrics table {there} --population {POPULATION}", "needs no server"),
        ("fedcompute quickstart --model emnist-cnn --noise-multiplier 0", "the tutorial's network"),
    ]
    for number, (command, comment) in enumerate(commands):
        head = "         " if number else "[bold]Look on[/]  "
        console.print(f"{head}{command}" + (f"     [dim]{comment}[/]" if comment else ""))
