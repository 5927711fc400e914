"""The composition root: settings in, a running server out."""

import contextlib
import logging
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from fedcompute.crypto.secret_box import KEY_BYTES
from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.server.api import assignments, blobs, health, keys, operator, privacy, reports, tasks
from fedcompute.server.api.requests import RequestLog, render_http_error, render_typed_error
from fedcompute.server.connection import BoundedConnection
from fedcompute.server.context import Context, Plans, now
from fedcompute.server.executors import Executor, ProcessExecutor
from fedcompute.server.rounds.engine import Engine
from fedcompute.server.rounds.jobs import Jobs
from fedcompute.server.rounds.passes import Passes
from fedcompute.server.security.keys import current_keys
from fedcompute.server.settings import Settings
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.claim import Claim
from fedcompute.storage.database import Database, sqlite_file
from fedcompute.storage.secrets import ensure_secret

# A device's certificate chain in a header takes 4-8 KiB (spec/device.md 1.2).
HEADER_BYTES_LIMIT = 64 * 1024
# How long requests under way may take after a signal to stop.
GRACE_SECONDS = 10


def create_app(settings: Settings, executor: Executor | None = None) -> Starlette:
    """Returns the application: every route, and the round engine for as long as the application runs.

    Its lifespan opens database and blob store, makes the server's secrets at first start, and stops the engine
    and the worker processes at the end. Raises OperationFailed at start-up if a store cannot be opened.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            claim, database = await run_in_threadpool(_open_database, settings)
        except FedComputeError as error:
            app.state.start_error = error
            raise
        workers = executor or ProcessExecutor(settings.worker_count)
        try:
            engine = Engine(lambda: passes())
            try:
                app.state.context = context = _context(settings, database, workers, engine)
            except FedComputeError as error:
                app.state.start_error = error
                raise
            passes = Passes(context)
            engine.start()
            try:
                yield
            finally:
                await engine.stop()
        finally:
            workers.close()
            database.close()
            if claim is not None:
                claim.close()

    return Starlette(
        routes=[
            *assignments.routes,
            *reports.routes,
            *blobs.routes,
            *keys.routes,
            *tasks.routes,
            *operator.routes,
            *privacy.routes,
            *health.routes,
        ],
        middleware=[Middleware(RequestLog)],
        exception_handlers={FedComputeError: render_typed_error, HTTPException: render_http_error},
        lifespan=lifespan,
    )


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the requests and the pass under way and returns; main thread only.

    Raises OperationFailed if a store cannot be opened or the port cannot be had.
    """
    running = server(settings)
    # The server raises the signal again once it has stopped; to end by it would skip the caller's own clean-up.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            running.run()
    except SystemExit:
        app = running.config.app
        error = getattr(app.state, "start_error", None) if isinstance(app, Starlette) else None
        detail = f"the server could not start on {settings.host}:{settings.port}; the log says why"
        raise error or OperationFailed(Reason.SETTINGS_INVALID, detail) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def server(settings: Settings, executor: Executor | None = None) -> uvicorn.Server:
    """The HTTP server of an application, not started; `should_exit` of the result stops it."""
    # It writes query strings, which hold signatures; our own access log does not.
    logging.getLogger("uvicorn.access").disabled = True
    config = uvicorn.Config(
        create_app(settings, executor),
        host=settings.host,
        port=settings.port,
        http=BoundedConnection,
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES_LIMIT,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def _open_database(settings: Settings) -> tuple[Claim | None, Database]:
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        detail = f"the data directory cannot be made: {error.strerror}"
        raise OperationFailed(Reason.SETTINGS_INVALID, detail) from error
    file = sqlite_file(settings.database)
    claim = Claim(file.with_name(file.name + ".lock")) if file is not None else None
    try:
        return claim, Database.open(settings.database)
    except BaseException:
        if claim is not None:
            claim.close()
        raise


def _context(settings: Settings, database: Database, executor: Executor, engine: Engine) -> Context:
    store = open_blob_store(settings.blobs)
    with database.write() as tx:
        url_key = ensure_secret(tx, "url_signing", secrets.token_bytes(32), now())
        noise_key = ensure_secret(tx, "noise_state", secrets.token_bytes(KEY_BYTES), now())
    current_keys(database, settings, now())
    return Context(
        settings=settings,
        database=database,
        blobs=store,
        jobs=Jobs(executor, settings.job_attempts, engine.wake),
        plans=Plans(store, settings.max_checkpoint_bytes),
        url_key=url_key,
        noise_key=noise_key,
        wake=engine.wake,
        is_alive=lambda: engine.alive,
        warm_up=executor.warm_up,
    )
