"""Options that several commands share, so that they are named and explained alike."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_SERVER = "http://localhost:8080"

Server = Annotated[str, typer.Option("--server", help="Base URL of the server.", envvar="FEDCOMPUTE_SERVER")]
Population = Annotated[str, typer.Option("--population", help="Population of the task.")]
TaskId = Annotated[int, typer.Option("--task-id", min=1, help="Id of the task within its population.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="File with the API key, for a server that asks for one.",
        show_default="the variable FEDCOMPUTE_API_KEY",
    ),
]


class Workers(StrEnum):
    """Where workers are, as the command line says it."""

    PROCESSES = "processes"
    RAY = "ray"
