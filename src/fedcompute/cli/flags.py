"""Flags as the published programs have them: `--f=v`, `--f v`, one dash or two, `--nof` (spec/task-builder.md 8.2)."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from absl import flags, logging

from fedcompute import __version__
from fedcompute.cli.errors import typed_errors
from fedcompute.cli.quiet import quiet_http_client
from fedcompute.monitoring.tracing import TRACING_VARIABLE


def run(
    program: Callable[[flags.FlagValues], int],
    define: Callable[[flags.FlagValues], None],
    usage: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the flags that `define` declares, sets up glog-style lines on stderr, runs `program`, exits with its code.

    A wrong flag, a missing one (ValueError) and a typed error end it with code 1 and without a traceback.
    """
    arguments = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_boolean("help", False, "Show this text and exit.", short_name="h", flag_values=values)
    flags.DEFINE_boolean("version", False, "Print the version and exit.", flag_values=values)
    try:
        rest = values(arguments)
    except flags.Error as error:
        _fail(f"{error}\nSee {Path(arguments[0]).name} --help.")
    if values["help"].value:
        typer.echo(f"{usage.strip()}\n\nflags:{values.get_help(prefix='  ')}")
        sys.exit(0)
    if values["version"].value:
        typer.echo(f"{Path(arguments[0]).name} {__version__}")
        sys.exit(0)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; every value belongs to a flag, as in --flag=value")
    _set_up_logging(arguments[0])
    try:
        with typed_errors():
            sys.exit(program(values))
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except ValueError as error:
        _fail(f"ValueError: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def define_tracing(values: flags.FlagValues) -> None:
    """Declares `--tracing_url`."""
    flags.DEFINE_string(
        "tracing_url",
        None,
        f"URL of an OTLP/HTTP collector for traces, such as http://localhost:4318; {TRACING_VARIABLE} by default, "
        "where other users of this machine do not see it.",
        flag_values=values,
    )


def tracing_url(values: flags.FlagValues) -> str | None:
    """The collector that the flag or the environment names."""
    return values["tracing_url"].value or os.environ.get(TRACING_VARIABLE) or None


def _set_up_logging(program: str) -> None:
    # The library keeps its own settings as flags and complains until they are parsed.
    flags.FLAGS([program])
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    quiet_http_client()


def _fail(text: str) -> None:
    typer.echo(text, err=True)
    sys.exit(1)
