"""`fedcompute server`: every server role on one machine."""

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute import __version__
from fedcompute.cli.quiet import quiet_http_client
from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.server.settings import RetryWindow, Settings

if TYPE_CHECKING:
    import uvicorn

KEY_PATH = "/.well-known/odp/v1/public-keys"
_WINDOW = "seconds, MIN:MAX"

_ADDRESS = "Address"
_STORAGE = "Storage"
_WAITING = "When devices come back, and how long the server waits"
_LIMITS = "Limits and security"


app = typer.Typer(add_completion=False)


@app.command(epilog="Example: fedcompute server --data-dir runs/digits --port 8080")
def server(
    data_dir: Annotated[
        Path, typer.Option(help="Where the database and the blobs lie; made if missing.", rich_help_panel=_STORAGE)
    ] = Path("fedcompute-data"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.", rich_help_panel=_ADDRESS)
    ] = Settings.host,
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 for any free one.", min=0, max=65535, rich_help_panel=_ADDRESS)
    ] = Settings.port,
    public_url: Annotated[
        str | None,
        typer.Option(
            help="The URL by which devices know this server.",
            show_default="http://localhost:PORT",
            rich_help_panel=_ADDRESS,
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            help="SQLAlchemy URL, such as postgresql+psycopg://host/name.",
            show_default="SQLite in the data directory",
            rich_help_panel=_STORAGE,
        ),
    ] = None,
    blob_url: Annotated[
        str | None,
        typer.Option(
            help="s3://, gs://, az:// or file:// URL.",
            show_default="a folder in the data directory",
            rich_help_panel=_STORAGE,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that aggregate and update; 0: one less than the CPUs, 1 to 4.", rich_help_panel=_LIMITS
        ),
    ] = Settings.workers,
    retry_no_task: Annotated[
        str, typer.Option(metavar=_WINDOW, help="When no round needs the device now.", rich_help_panel=_WAITING)
    ] = f"{Settings.retry_no_task.minimum:g}:{Settings.retry_no_task.maximum:g}",
    retry_no_active_task: Annotated[
        str, typer.Option(metavar=_WINDOW, help="When its population has no open task.", rich_help_panel=_WAITING)
    ] = f"{Settings.retry_no_active_task.minimum:g}:{Settings.retry_no_active_task.maximum:g}",
    retry_version_mismatch: Annotated[
        str, typer.Option(metavar=_WINDOW, help="When the device's version fits no task.", rich_help_panel=_WAITING)
    ] = f"{Settings.retry_version_mismatch.minimum:g}:{Settings.retry_version_mismatch.maximum:g}",
    local_compute_timeout: Annotated[
        float, typer.Option(help="Seconds that a device has to compute.", rich_help_panel=_WAITING)
    ] = Settings.local_compute_timeout,
    upload_timeout: Annotated[
        float, typer.Option(help="Seconds that a device has to upload.", rich_help_panel=_WAITING)
    ] = Settings.upload_timeout,
    signed_url_life: Annotated[
        float, typer.Option(help="Seconds that an upload URL is valid.", rich_help_panel=_WAITING)
    ] = Settings.signed_url_life,
    artifact_url_life: Annotated[
        float, typer.Option(help="Seconds that a download URL is valid.", rich_help_panel=_WAITING)
    ] = Settings.artifact_url_life,
    collector_batch_size: Annotated[
        int, typer.Option(help="Uploads that are aggregated together.", rich_help_panel=_LIMITS)
    ] = Settings.collector_batch_size,
    job_attempts: Annotated[
        int, typer.Option(help="How often a failing job is tried.", rich_help_panel=_LIMITS)
    ] = Settings.job_attempts,
    max_upload_bytes: Annotated[
        int, typer.Option(help="Largest upload, as it travels.", rich_help_panel=_LIMITS)
    ] = Settings.max_upload_bytes,
    max_checkpoint_bytes: Annotated[
        int, typer.Option(help="Largest checkpoint or plan, uncompressed.", rich_help_panel=_LIMITS)
    ] = Settings.max_checkpoint_bytes,
    allow_plaintext_uploads: Annotated[
        bool,
        typer.Option(
            "--allow-plaintext-uploads", help="Count updates that are not encrypted.", rich_help_panel=_LIMITS
        ),
    ] = Settings.allow_plaintext_uploads,
    key_rotation: Annotated[
        float, typer.Option(help="Seconds after which a new encryption key is made.", rich_help_panel=_LIMITS)
    ] = Settings.key_rotation,
    key_max_age: Annotated[
        float, typer.Option(help="Seconds for which devices may remember a key.", rich_help_panel=_LIMITS)
    ] = Settings.key_max_age,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error; logs go to stderr.")] = "warning",
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as one line of JSON.")] = False,
) -> None:
    """Run a federated compute server: APIs, blobs, keys and the round engine on one port."""
    settings = Settings(
        data_dir=data_dir,
        host=host,
        port=port,
        public_url=public_url,
        database_url=database_url,
        blob_url=blob_url,
        retry_no_task=read_window("--retry-no-task", retry_no_task),
        retry_no_active_task=read_window("--retry-no-active-task", retry_no_active_task),
        retry_version_mismatch=read_window("--retry-version-mismatch", retry_version_mismatch),
        signed_url_life=signed_url_life,
        artifact_url_life=artifact_url_life,
        local_compute_timeout=local_compute_timeout,
        upload_timeout=upload_timeout,
        collector_batch_size=collector_batch_size,
        workers=workers,
        job_attempts=job_attempts,
        max_upload_bytes=max_upload_bytes,
        max_checkpoint_bytes=max_checkpoint_bytes,
        allow_plaintext_uploads=allow_plaintext_uploads,
        key_rotation=key_rotation,
        key_max_age=key_max_age,
    )
    configure_logging(log_level)
    listener = listen(host, port)
    settings = replace(settings, port=listener.getsockname()[1])

    import fedcompute.app

    serve(fedcompute.app.server(settings), listener, _announcement(settings, as_json=as_json))


def read_window(option: str, text: str) -> RetryWindow:
    """Reads `MIN:MAX` seconds, or one number for both; raises OperationFailed(SETTINGS_INVALID)."""
    minimum, _, maximum = text.partition(":")
    try:
        return RetryWindow(float(minimum), float(maximum or minimum))
    except ValueError:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"{option}: {text!r} is no window of seconds", remedy="write it as 60:300"
        ) from None


def configure_logging(level: str) -> None:
    """Sends log lines of `level` and above to stderr; raises OperationFailed(SETTINGS_INVALID)."""
    if level.lower() not in ("debug", "info", "warning", "error"):
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"--log-level: {level!r} is no level", remedy="use debug, info, warning or error"
        )
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    quiet_http_client()


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; raises OperationFailed(SETTINGS_INVALID) with the system's reason.

    Bound before anything else starts, so that a port in use costs nothing and leaves nothing behind.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            remedy="stop the program that listens there, or choose another --host or --port",
        ) from error


def serve(running: "uvicorn.Server", listener: socket.socket, announcement: str) -> None:
    """Serves on a bound socket until Ctrl-C or SIGTERM; prints the announcement once requests are answered.

    Raises the typed error that kept the application from starting, or OperationFailed(INTERNAL) for another cause.
    """
    failures = _keep_start_failure(running.config.app)
    # The web server's own account of a failed start is a traceback; the typed error says it better.
    logging.getLogger("uvicorn.error").addFilter(lambda _: not failures)
    threading.Thread(target=_announce, args=(running, announcement), daemon=True).start()
    try:
        running.run(sockets=[listener])
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
    while not running.started:
        if running.should_exit:
            return
        time.sleep(0.01)
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


def _announcement(settings: Settings, *, as_json: bool) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    listening = f"http://{host}:{settings.port}"
    if as_json:
        return json.dumps(
            {
                "listening": listening,
                "url": settings.base_url,
                "key_url": settings.base_url + KEY_PATH,
                "data_dir": str(settings.data_dir),
            }
        )
    return (
        f"fedcompute server {__version__}\n"
        f"  listening on    {listening}\n"
        f"  devices use     {settings.base_url}\n"
        f"  public keys     {settings.base_url}{KEY_PATH}\n"
        f"  data directory  {settings.data_dir}\n"
        f"  stop with       Ctrl-C; rounds in progress go on at the next start"
    )
