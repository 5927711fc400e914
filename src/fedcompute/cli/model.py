"""`fedcompute model`: released weights on their way back into the user's model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect
from fedcompute.errors import OperationFailed, Reason
from fedcompute.models.quiet import quiet_tensorflow

app = typer.Typer(no_args_is_help=True, help="Export a round's weights into your model.")


@app.callback()
def _group() -> None:
    """Export a round's weights into your model."""


@app.command(
    epilog="Example: fedcompute model export --population my_population --task-id 1 --iteration latest "
    "--model model.keras --out trained.keras"
)
def export(
    population: options.Population,
    model: Annotated[
        Path, typer.Option(help="The model as you built it: a .keras file or a FunctionalModel SavedModel.")
    ],
    out: Annotated[Path, typer.Option(help="Where the trained model goes: a .keras file or a directory, as --model.")],
    task_id: options.TaskId = 1,
    iteration: Annotated[str, typer.Option(help="Round number, 0 for the initial weights, or latest.")] = "latest",
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the weights that a training round released into your own model."""
    from fedcompute.learning.specification import NON_TRAINABLE, TRAINABLE
    from fedcompute.tensors.checkpoint import read_checkpoint
    from fedcompute.tensors.tree import subtree

    wanted = _read_iteration(iteration)
    if out.exists() and not force:
        raise OperationFailed(Reason.SETTINGS_INVALID, f"--out: {out} exists", remedy="choose another, or give --force")
    if not model.exists():
        raise OperationFailed(Reason.NOT_FOUND, f"--model: there is no {model}", remedy="give the model that you built")
    data, found = connect(server, api_key_file).checkpoint(population, task_id, wanted)
    tensors = read_checkpoint(data)
    trainable = list(subtree(tensors, TRAINABLE).values())
    non_trainable = list(subtree(tensors, NON_TRAINABLE).values())
    with quiet_tensorflow():
        from fedcompute.models.export import export_weights

        export_weights(model, trainable, non_trainable, out)
    parameters = sum(leaf.size for leaf in (*trainable, *non_trainable))
    if as_json:
        typer.echo(json.dumps({"iteration": found, "parameters": parameters, "out": str(out)}))
    else:
        typer.echo(f"{out}: {parameters:,} parameters of round {found}, task {population}/{task_id}")


def _read_iteration(text: str) -> int | None:
    if text == "latest":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"--iteration: {text!r} is no round", remedy="write a number, or latest"
        )
    return int(text)
