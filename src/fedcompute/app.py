"""The composition root: settings in, a running server out."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from fedcompute import __version__
from fedcompute.crypto.secret_box import KEY_BYTES
from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.monitoring.pages.errors import error_page
from fedcompute.monitoring.pages.routes import PAGES
from fedcompute.monitoring.tracing import FLUSH_S, SERVER, start_tracing
from fedcompute.server.api import assignments, blobs, health, keys, measuring, operations, reports
from fedcompute.server.api.addresses import Addresses
from fedcompute.server.api.admission import Admission
from fedcompute.server.api.guard import Guard
from fedcompute.server.api.measuring import Measuring
from fedcompute.server.api.requests import RequestLog, render_http_error, render_typed_error
from fedcompute.server.connection import BoundedConnection
from fedcompute.server.context import Context, Plans, now
from fedcompute.server.executors import Executor, open_executor
from fedcompute.server.listening import listen
from fedcompute.server.measures import Measures
from fedcompute.server.recorder import Recorder
from fedcompute.server.retention import Retention, RetentionThread
from fedcompute.server.rounds.check_ins import CheckIns
from fedcompute.server.rounds.engine import Engine
from fedcompute.server.rounds.jobs import Jobs
from fedcompute.server.rounds.leases import Leases
from fedcompute.server.rounds.passes import Passes
from fedcompute.server.security.authentication import open_authentication
from fedcompute.server.security.keys import publication
from fedcompute.server.security.operator_secret import open_sealer
from fedcompute.server.security.operators import warn_if_locked
from fedcompute.server.security.public_keys import PublicKeyList
from fedcompute.server.security.rates import rates_of
from fedcompute.server.settings import PROCESSES, Settings
from fedcompute.server.state_gauges import StateGauges
from fedcompute.server.tls import Certificate
from fedcompute.server.uploads import Uploads
from fedcompute.server.web_server import WebServer
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.claim import Claim
from fedcompute.storage.database import Database, sqlite_file
from fedcompute.storage.paths import MODEL
from fedcompute.storage.secrets import ensure_secret, seal_plain

_LOG = logging.getLogger(__name__)


def create_app(settings: Settings, executor: Executor | None = None) -> Starlette:
    """Returns the application: every route, and the round engine for as long as the application runs.

    Its lifespan opens database and blob store, makes the server's secrets at first start, and stops the engine
    and the worker processes at the end. Raises OperationFailed at start-up if a store cannot be opened.
    """

    measures = Measures(settings.roles)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(_tell)
        try:
            workers = executor or _executor(settings)
            claim, database = await run_in_threadpool(_open_database, settings)
        except FedComputeError as error:
            app.state.start_error = error
            raise
        stop_tracing = start_tracing(None, SERVER)
        recorder = Recorder(database, measures)
        database.observe = measures.transaction
        try:
            engine = Engine(lambda: passes())
            try:
                stop_tracing = await run_in_threadpool(start_tracing, settings.tracing_url, SERVER)
                app.state.context = context = _context(settings, database, workers, engine, measures)
            except FedComputeError as error:
                app.state.start_error = error
                raise
            app.state.readiness = health.readiness_of(context)
            measures.watch(StateGauges(context))
            recorder.start()
            _LOG.info("fedcompute %s runs as %s", __version__, " and ".join(settings.roles))
            passes = Passes(context)
            with contextlib.closing(CheckIns(context)) as app.state.check_ins:
                async with _rounds(context, engine) if settings.runs_engine else contextlib.nullcontext():
                    yield
        finally:
            await run_in_threadpool(recorder.stop)
            workers.close()
            await run_in_threadpool(stop_tracing, min(FLUSH_S, settings.stop_grace))
            _close_authentication(app)
            database.close()
            if claim is not None:
                claim.close()

    api = [
        *assignments.routes,
        *reports.routes,
        *blobs.routes,
        *keys.routes,
        *operations.routes,
        *operations.routes_of(PAGES),
    ]
    app = Starlette(
        routes=[*(api if settings.runs_api else ()), *health.routes, *measuring.routes],
        middleware=[
            Middleware(Measuring, measures=measures),
            Middleware(RequestLog),
            Middleware(Addresses, settings=settings),
            Middleware(Admission, settings),
            Middleware(Guard, operations=(*operations.OPERATIONS, *PAGES), error_page=error_page),
        ],
        exception_handlers={FedComputeError: render_typed_error, HTTPException: render_http_error},
        lifespan=lifespan,
    )
    # A device must never meet a redirect (spec/device.md 1.10), and this one would be made from the Host header.
    app.router.redirect_slashes = False
    return app


def _close_authentication(app: Starlette) -> None:
    context: Context | None = getattr(app.state, "context", None)
    if context is not None and context.authentication is not None:
        context.authentication.close()


def _tell(loop: asyncio.AbstractEventLoop, facts: dict[str, Any]) -> None:
    # The store reads an upload in a task of its own; that a stop ends it is no news, and nobody is left to hear of it.
    if not isinstance(facts.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(facts)


@asynccontextmanager
async def _rounds(context: Context, engine: Engine) -> AsyncIterator[None]:
    engine.start()
    retention = RetentionThread(Retention(context.database, context.blobs, context.settings))
    retention.start()
    try:
        yield
    finally:
        await run_in_threadpool(retention.stop)
        await engine.stop()
        await run_in_threadpool(_hand_over, context)


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the requests and the pass under way and returns; main thread only.

    Raises OperationFailed if a store cannot be opened or the port cannot be had.
    """
    running = server(settings)
    addresses = {(settings.host, settings.port), settings.operator_address}
    try:
        running.run(sockets=[listen(*one) for one in sorted(addresses)] if settings.splits_operators else None)
    except SystemExit:
        app = running.config.app
        error = getattr(app.state, "start_error", None) if isinstance(app, Starlette) else None
        detail = f"the server could not start on {settings.host}:{settings.port}; the log says why"
        raise error or OperationFailed(Reason.SETTINGS_INVALID, detail) from None


def server(settings: Settings, executor: Executor | None = None) -> WebServer:
    """The HTTP server of an application, not started; `should_exit` of the result stops it.

    Raises OperationFailed(TLS_INVALID) if the files of its certificate cannot be used.
    """
    # It writes query strings, which hold signatures; our own access log does not.
    logging.getLogger("uvicorn.access").disabled = True
    config = uvicorn.Config(
        create_app(settings, executor),
        host=settings.host,
        port=settings.port,
        http=BoundedConnection,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        # Whom to believe about addresses is a setting (`trusted_proxies`).
        proxy_headers=False,
        # The library's type is narrower than what it does with it.
        timeout_graceful_shutdown=settings.stop_grace,  # type: ignore[arg-type]
    )
    if settings.tls_certificate is None or settings.tls_key is None:
        return WebServer(config)
    return WebServer(config, Certificate(settings.tls_certificate, settings.tls_key))


def _executor(settings: Settings) -> Executor:
    if not settings.runs_engine:
        # It gets no job, and so starts nothing; Ray need not be installed here.
        return open_executor(PROCESSES, None, 1)
    return open_executor(settings.executor, settings.ray_address, settings.most_workers)


def _open_database(settings: Settings) -> tuple[Claim | None, Database]:
    try:
        # Updates of single devices lie here, and un-noised sums.
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        detail = f"the data directory cannot be made: {error.strerror} ({settings.data_dir})"
        raise OperationFailed(Reason.SETTINGS_INVALID, detail) from error
    file = sqlite_file(settings.database)
    claim = Claim(file.with_name(file.name + ".lock")) if file is not None else None
    try:
        return claim, Database.open(settings.database)
    except BaseException:
        if claim is not None:
            claim.close()
        raise


def _hand_over(context: Context) -> None:
    try:
        context.jobs.hand_over()
    except FedComputeError as error:
        # The leases expire; a database that is gone must not keep a server from stopping.
        _LOG.warning("jobs could not be handed over: %s", error)


def _context(settings: Settings, database: Database, executor: Executor, engine: Engine, measures: Measures) -> Context:
    store = open_blob_store(settings.blobs)
    store.check_writes_once()
    if settings.blob_urls == "store":
        # So that a store that cannot is found out now, not by the first device.
        store.signed_url("GET", MODEL, "start", settings.signed_url_life)
    sealer = open_sealer(settings, database)
    with database.write() as tx:
        sealed = seal_plain(tx, sealer)
        url_key = ensure_secret(tx, sealer, "url_signing", secrets.token_bytes(32), now())
        challenge_key = ensure_secret(tx, sealer, "device_challenges", secrets.token_bytes(32), now())
        noise_key = ensure_secret(tx, sealer, "noise_state", secrets.token_bytes(KEY_BYTES), now())
        session_key = ensure_secret(tx, sealer, "browser_sessions", secrets.token_bytes(32), now())
    if settings.runs_api:
        warn_if_locked(database, settings, now())
    if sealed:
        _LOG.warning(
            "%d secrets were stored in plain and are sealed now; copies of the database made before are not", sealed
        )
        try:
            database.scrub()
        except OperationFailed as error:
            _LOG.warning("traces of them are left in the database file until it is vacuumed: %s", error)
    elsewhere = settings.key_service_public_url
    if elsewhere is None:
        publication(database, sealer, settings, now())
    # One server has a SQLite file to itself (`Claim`).
    alone = sqlite_file(settings.database) is not None
    leases = None if alone else Leases(database, settings.lease_lifetime)
    return Context(
        settings=settings,
        database=database,
        blobs=store,
        jobs=Jobs(executor, settings.job_attempts, engine.wake, leases, measures),
        uploads=Uploads(alone=alone),
        measures=measures,
        plans=Plans(store, settings.max_checkpoint_bytes),
        sealer=sealer,
        key_list=None if elsewhere is None else PublicKeyList(elsewhere),
        url_key=url_key,
        noise_key=noise_key,
        session_key=session_key,
        authentication=open_authentication(settings, database, sealer, challenge_key),
        wake=engine.wake,
        is_alive=lambda: engine.alive or not settings.runs_engine,
        rates=rates_of(settings),
        warm_up=executor.warm_up if settings.runs_engine else lambda: None,
    )
