"""`fedcompute server`: every server role on one machine."""

import dataclasses
import inspect
import json
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute import __version__
from fedcompute.cli.android import adb_commands, phone_lines
from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.server.configuration import (
    CONFIG_VARIABLE,
    configure,
    flag_of,
    kind_of,
    render_json,
    render_toml,
    setting_fields,
)
from fedcompute.server.listening import listen
from fedcompute.server.logs import Logs, configure_logging
from fedcompute.server.security.operators import opens_without_key
from fedcompute.server.setting import about
from fedcompute.server.settings import Settings

if TYPE_CHECKING:
    import uvicorn

KEY_PATH = "/.well-known/odp/v1/public-keys"

app = typer.Typer(add_completion=False)


def server(
    config: Path | None, show_config: bool, as_json: bool, android: bool, **flags: str | bool | list[str] | None
) -> None:
    """Run a federated compute server: APIs, blobs, keys and the round engine on one port.

    Every setting is an option here, a variable FEDCOMPUTE_NAME of the environment, or a line of the settings file;
    the first of them that sets it counts.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    configuration = configure(given, os.environ, config)
    if show_config:
        typer.echo(render_json(configuration) if as_json else render_toml(configuration), nl=as_json)
        return
    settings = configuration.settings
    configure_logging(Logs(settings.log_level, settings.log_format))
    listeners = [listen(settings.host, settings.port)]
    settings = replace(settings, port=listeners[0].getsockname()[1])
    if settings.splits_operators:
        listeners.append(listen(settings.operator_host, settings.operator_port))

    import fedcompute.app

    serve(fedcompute.app.server(settings), listeners, _announcement(settings, as_json=as_json, android=android))


def _options() -> list[inspect.Parameter]:
    found = [_option(one) for one in setting_fields()]
    for name, kind, default, info in (
        ("config", Path | None, None, typer.Option(help=f"TOML file with settings. Default: {CONFIG_VARIABLE}.")),
        ("show_config", bool, False, typer.Option("--show-config", help="Print every setting with its source.")),
        ("as_json", bool, False, typer.Option("--json", help="Print one JSON document instead of text.")),
        ("android", bool, False, typer.Option("--android", help="Print the adb commands that point a phone here.")),
    ):
        found.append(_parameter(name, kind, default, info))
    return found


def _option(field: "dataclasses.Field[Any]") -> inspect.Parameter:
    facts, kind = about(field), kind_of(field.name)
    default = facts.shown or ("" if field.default is None else kind.show(field.default))
    options: dict[str, Any] = {
        "help": f"{facts.help} Default: {default}." if default else facts.help,
        "rich_help_panel": facts.panel,
        "show_default": False,
    }
    if kind.is_switch:
        flag = flag_of(field.name)
        return _parameter(field.name, bool | None, None, typer.Option(f"{flag}/--no-{flag[2:]}", **options))
    annotation = list[str] | None if kind.many else str | None
    options["metavar"] = "|".join(facts.choices) or kind.metavar
    return _parameter(field.name, annotation, None, typer.Option(flag_of(field.name), **options))


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


# The program's options are read from the signature; they follow from the settings.
server.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
server.__annotations__ = {one.name: one.annotation for one in _options()}
app.command(epilog="Example: fedcompute server --data-dir runs/digits --port 8080")(server)


def serve(running: "uvicorn.Server", listeners: list[socket.socket], announcement: str) -> None:
    """Serves on bound sockets until Ctrl-C or SIGTERM; prints the announcement once requests are answered.

    Raises the typed error that kept the application from starting, or OperationFailed(INTERNAL) for another cause.
    """
    failures = _keep_start_failure(running.config.app)
    # The web server's own account of a failed start is a traceback; the typed error says it better.
    logging.getLogger("uvicorn.error").addFilter(lambda _: not failures)
    threading.Thread(target=_announce, args=(running, announcement), daemon=True).start()
    try:
        running.run(sockets=listeners)
    except KeyboardInterrupt:
        # Raised again by uvicorn after its orderly shutdown: Ctrl-C is how a server ends.
        return
    except SystemExit:
        if not failures:
            raise
    if failures:
        raise failures[0]
    if not running.started:
        raise OperationFailed(Reason.INTERNAL, "the server did not start", remedy="read the log lines above")


def _announce(running: "uvicorn.Server", announcement: str) -> None:
    from fedcompute.server.web_server import keep_what_started

    while not running.started:
        if running.should_exit:
            return
        time.sleep(0.01)
    keep_what_started()
    typer.echo(announcement)


def _keep_start_failure(app: Any) -> list[Exception]:
    """A list that takes the error, typed or of the system, with which the application's lifespan ends."""
    failures: list[Exception] = []
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def watched(app: Any) -> AsyncIterator[Any]:
        try:
            async with lifespan(app) as state:
                yield state
        except (FedComputeError, OSError) as error:
            failures.append(error)
            raise

    app.router.lifespan_context = watched
    return failures


def _announcement(settings: Settings, *, as_json: bool, android: bool) -> str:
    scheme = "http" if settings.tls_certificate is None else "https"
    listening = f"{scheme}://{_authority(settings.host, settings.port)}"
    dashboard = f"{scheme}://{_authority(*settings.operator_address)}/"
    commands: list[str] = []
    if android and settings.runs_api:
        encryption = not settings.allow_plaintext_uploads
        commands = adb_commands(settings.base_url, settings.base_url + KEY_PATH, encryption=encryption)
    if as_json:
        return json.dumps(
            {
                "listening": listening,
                "url": settings.base_url,
                "key_url": settings.base_url + KEY_PATH,
                "dashboard": dashboard if settings.runs_api else None,
                "data_dir": str(settings.data_dir),
                "operators_need_api_key": not opens_without_key(settings),
                **({"android": commands} if android else {}),
            }
        )
    for_devices = (
        f"  devices use     {settings.base_url}\n  public keys     {settings.base_url}{KEY_PATH}\n"
        f"  dashboard       {dashboard}\n"
        if settings.runs_api
        else "  devices use     another server; this one only runs rounds\n"
    )
    return (
        f"fedcompute server {__version__}\n"
        f"  listening on    {listening}\n"
        f"{for_devices}"
        f"  data directory  {settings.data_dir}\n"
        f"{_for_operators(settings) if settings.runs_api else ''}"
        f"  stop with       Ctrl-C; rounds in progress go on at the next start"
        f"{phone_lines(commands)}"
    )


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _for_operators(settings: Settings) -> str:
    if opens_without_key(settings):
        return ""
    # The URL may hold a password.
    where = f"--data-dir {settings.data_dir}" if settings.database_url is None else "--database-url URL"
    return (
        "  operators need  an API key; make one on this machine with\n"
        f"                  fedcompute api-key create --role operator --label NAME {where}\n"
    )
