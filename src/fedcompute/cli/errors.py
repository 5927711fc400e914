"""How a refusal looks at a prompt: one block on stderr, exit code 1, no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fedcompute.errors import FedComputeError


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turns a typed error, or a file that cannot be opened, into a block on stderr and exit code 1."""
    try:
        yield
    except FedComputeError as error:
        show_error(error)
        raise typer.Exit(1) from error
    except BrokenPipeError:
        # The reader of a pipe has left, as `| head` does; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None:
            raise
        _block(f"{error.filename}: {error.strerror}", type(error).__name__, "check the path and its access rights")
        raise typer.Exit(1) from error


def show_error(error: FedComputeError) -> None:
    """Prints what happened, the stable code, and what to do, on stderr."""
    _block(error.detail, error.reason.value, error.remedy)


def _block(what: str, code: str, remedy: str) -> None:
    indented = what.strip().replace("\n", "\n        ")
    typer.echo(f"Error:  {indented}\nCode:   {code}\nRemedy: {remedy}", err=True)
