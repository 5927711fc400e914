"""The operations of installed services: who may ask, what the worker is given, what is done with its answer
(spec/device.md 7.2).
"""

import asyncio
import html
import math
import random
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from fedcompute.device.allow_lists import allows, allows_pair
from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.log_records import Row
from fedcompute.device.developer.user_data import AppInfo, UserData
from fedcompute.device.developer.worker import (
    DEFAULT_BEST_VALUE,
    DownloadCompletedOutput,
    EventInput,
    EventOutput,
    ExecuteInput,
    ExecuteOutput,
    RenderingConfig,
    RenderInput,
    RenderOutput,
    TrainingExampleInput,
    TrainingExampleOutput,
    WebTriggerInput,
    WebTriggerOutput,
)
from fedcompute.device.facilities import Facilities, NotAnswered, Outside
from fedcompute.device.isolation.messages import HOOKS
from fedcompute.device.isolation.worker_call import Service, WorkerFailed, call_worker
from fedcompute.device.jobs.flags import Flags, flags
from fedcompute.device.owner import Owner
from fedcompute.device.state import error_counts, key_values, log_records
from fedcompute.device.state.apps import App, find_app, list_apps
from fedcompute.device.state.database import DeviceDatabase, Transaction
from fedcompute.device.state.device_log import LogEntry, write_entry
from fedcompute.device.state.device_secret import sealing_key
from fedcompute.device.state.settings import Consent, consent
from fedcompute.device.state.tasks import Removal, ScheduleRequest, cancel, schedule
from fedcompute.device.surface import Event, Surface, event_url, open_event_url, open_surface, seal_surface

HTML_CHARACTERS_LIMIT = 4 << 20
"""Of an expanded template."""

# Operations at a time; each may take the memory that a service may have.
_PLACES = 4
_SEES_APPS = ("execute", "training_examples")


@dataclass(frozen=True)
class Executed:
    """What an app gets for `execute`: a token for a surface, if there is something to show, and a value or -1."""

    surface_token: bytes | None
    best_value: int


@dataclass(frozen=True)
class UrlAnswer:
    """What opening an event URL gives: data for an image, or where to go on."""

    data: bytes | None = None
    mime_type: str | None = None
    destination: str | None = None


@dataclass
class _Operation:
    """What is known of an operation in progress. `name`: of `HOOKS`; `printed`: by the developer's code."""

    name: str
    app: App | None = None
    printed: str = ""


@dataclass(frozen=True)
class _Standing:
    """An app, the rules of the moment, and the operation that it is asked for."""

    app: App
    flags: Flags
    consent: Consent
    operation: _Operation


class Personalization:
    """The device's side of every operation.

    A failure is raised as WorkerFailed. Each operation leaves one entry in the device's log, with how it ended and,
    where measurement is consented to, what the developer's code printed; one that is cancelled leaves none.
    """

    def __init__(
        self,
        database: DeviceDatabase,
        *,
        clock: Callable[[], int],
        user_data: Callable[[], UserData],
        strict: bool = True,
        chance: random.Random | None = None,
    ) -> None:
        """`clock`: Unix milliseconds. `user_data`: the situation now, without apps. `strict`: no operation where the
        kernel enforces less than everything. `chance`: draws the noise of values, by default from the system.
        """
        self._database = database
        self._clock = clock
        self._user_data = user_data
        self._strict = strict
        self._chance = chance if chance is not None else random.SystemRandom()
        self._places = asyncio.Semaphore(_PLACES)

    async def execute(
        self, package: str, class_name: str, caller: str, app_params: Row, best_value_maximum: int | None = None
    ) -> Executed:
        """Calls `on_execute` for the app `caller`; `best_value_maximum`: the largest value that it wants, None for
        none. Raises ValueError for a maximum out of bounds.
        """
        with self._operation("execute") as operation:
            standing = self._standing(operation, package, class_name, caller)
            if best_value_maximum is not None:
                limit = standing.flags.integer("max_int_values_limit")
                if not 0 <= best_value_maximum <= limit:
                    raise ValueError(f"the largest best value is {best_value_maximum}, not 0 to {limit}")
            output: ExecuteOutput = await self._call(standing, ExecuteInput(caller, app_params))
            app, config = standing.app, output.rendering_config
            with self._database.write() as tx:
                given = _consent_now(tx, app)
                keys = tuple(config.keys) if config is not None else ()
                missing = set(keys) - set(key_values.key_set(tx, "remote_data", app.owner))
                if missing:
                    raise WorkerFailed(Status.SERVICE_FAILED, f"on_execute: remote data has no key {min(missing)!r}")
                request_id = 0
                if given.measurement:
                    request_id = log_records.write_records(
                        tx, app.owner, caller, output.request_log_record, output.event_log_records, self._clock()
                    )
                if not given.protected_audience:
                    return Executed(None, DEFAULT_BEST_VALUE)
                token = None
                if config is not None:
                    token = seal_surface(sealing_key(tx), Surface(app.owner, caller, request_id, keys))
            return Executed(token, self._best_value(standing, caller, output.best_value, best_value_maximum))

    async def render(self, token: bytes, width: int, height: int) -> str:
        """HTML of a surface, in a frame of `width` times `height` pixels.

        Raises ValueError for a frame without room.
        """
        if width <= 0 or height <= 0:
            raise ValueError(f"a surface of {width} x {height} pixels")
        with self._operation("render") as operation:
            surface, standing = self._surface(operation, token)
            request = RenderInput(width, height, RenderingConfig(surface.keys))
            output: RenderOutput = await self._call(standing, request)
            if output.content is not None:
                return output.content
            if output.template_id is None:
                raise WorkerFailed(Status.SERVICE_FAILED, "on_render: neither content nor a template")
            with self._database.read() as tx:
                template = key_values.get_value(tx, "remote_data", standing.app.owner, output.template_id)
            if template is None:
                raise WorkerFailed(Status.SERVICE_FAILED, f"on_render: remote data has no key {output.template_id!r}")
            return _expanded(template.decode(errors="replace"), output.template_params)

    async def open_event_url(self, token: bytes, url: str) -> UrlAnswer:
        """What a URL in the surface of `token` gives; calls `on_event`, whose event is kept once."""
        with self._operation("event") as operation:
            surface, standing = self._surface(operation, token)
            owner = standing.app.owner
            with self._database.write() as tx:
                event, destination = open_event_url(sealing_key(tx), url)
                request = log_records.read_request(tx, owner, surface.request_id)
            if event.owner != owner.digest:
                raise WorkerFailed(Status.INTERNAL, "an event URL of another service")
            output: EventOutput = await self._call(standing, EventInput(request, event.parameters))
            record = output.event_log_record
            with self._database.write() as tx:
                kept = record if _consent_now(tx, standing.app).measurement else None
                if kept is not None and not log_records.has_event(tx, owner, surface.request_id, kept):
                    log_records.write_event(tx, owner, surface.request_id, kept, self._clock())
            return UrlAnswer(event.data, event.mime_type, destination)

    async def web_trigger(self, package: str, class_name: str, request: WebTriggerInput) -> None:
        """Calls `on_web_trigger` and keeps its records."""
        with self._operation("web_trigger") as operation:
            caller = request.app_package_name
            standing = self._standing(operation, package, class_name, caller)
            if not standing.consent.measurement:
                raise WorkerFailed(Status.PERSONALIZATION_DISABLED, Removal.CONSENT.value)
            output: WebTriggerOutput = await self._call(standing, request)
            with self._database.write() as tx:
                if _consent_now(tx, standing.app).measurement:
                    log_records.write_records(
                        tx,
                        standing.app.owner,
                        caller,
                        output.request_log_record,
                        output.event_log_records,
                        self._clock(),
                    )

    async def complete_download(self, app: App, contents: Mapping[str, bytes], sync_token: int) -> int:
        """Hands a download to `on_download_completed` and keeps what it says; returns how many rows there are then."""
        with self._operation("download_completed") as operation:
            standing = self._standing(operation, app.owner.package, app.owner.class_name, None)
            output: DownloadCompletedOutput = await self._call(standing, None, contents)
            with self._database.write() as tx:
                _consent_now(tx, app)
                rows = key_values.keep_download(tx, app.owner, contents, output.retained_keys, sync_token)
                if not output.retained_keys:
                    text = "on_download_completed kept nothing: remote data is empty now"
                    write_entry(tx, LogEntry(self._clock(), app.owner.digest, "on_download_completed", "warning", text))
            return rows

    async def training_examples(self, owner: Owner, request: TrainingExampleInput) -> TrainingExampleOutput:
        """The examples of a population that the service has asked to train (spec 5.3), within the time that a run
        waits for them.

        One that it has not, or that consent no longer covers, loses its task.
        """
        with self._operation("training_examples") as operation:
            standing = self._standing(operation, owner.package, owner.class_name, None)
            with self._database.write() as tx:
                registered = tx.execute(
                    "SELECT 1 FROM registration WHERE owner = ? AND population = ?",
                    (owner.digest, request.population_name),
                ).fetchone()
                allowed = standing.consent.measurement and registered is not None and standing.app.owner == owner
                if not allowed:
                    cancel(tx, owner, request.population_name)
            if not allowed:
                raise WorkerFailed(Status.PERSONALIZATION_DISABLED, "no consent, or a population never scheduled")
            seconds = standing.flags.integer("example_store_service_timeout_sec")
            output: TrainingExampleOutput = await self._call(standing, request, seconds=seconds)
            return output

    def _schedule(self, app: App, population: str, recurrent: bool, minimum_interval: int) -> None:
        schedule_task(self._database, app, population, recurrent, minimum_interval, self._clock())

    def _cancel(self, app: App, population: str) -> None:
        with self._database.write() as tx:
            cancel(tx, app.owner, population)

    @contextmanager
    def _operation(self, name: str) -> Iterator[_Operation]:
        """Writes into the device's log how the operation in the block ends."""
        operation = _Operation(name)
        try:
            yield operation
        except WorkerFailed as failed:
            self._end(operation, failed)
            raise
        self._end(operation, None)

    def _end(self, operation: _Operation, failed: WorkerFailed | None) -> None:
        now, method = self._clock(), HOOKS[operation.name].method
        outcome = "ok" if failed is None else failed.platform_status.name.lower()
        detail = "" if failed is None else failed.detail
        with self._database.write() as tx:
            app = operation.app
            if app is None or not _is_installed(tx, app):
                # Of an app that is gone nothing is left, nor of what it printed.
                write_entry(tx, LogEntry(now, None, method, outcome, detail))
                return
            printed = operation.printed if consent(tx).measurement else ""
            write_entry(tx, LogEntry(now, app.owner.digest, method, outcome, detail, printed))
            if failed is not None:
                error_counts.count(tx, app.owner, failed.code, now)

    def _standing(self, operation: _Operation, package: str, class_name: str, caller: str | None) -> _Standing:
        with self._database.read() as tx:
            current, given = flags(tx), consent(tx)
            app = find_app(tx, package, class_name)
        operation.app = app
        if current.boolean("global_kill_switch"):
            raise WorkerFailed(Status.PERSONALIZATION_DISABLED, "global_kill_switch is on")
        if app is None:
            raise WorkerFailed(Status.NAME_NOT_FOUND, f"no app {package}/{class_name} is installed")
        if caller is not None and not allows(current.text("caller_app_allow_list"), caller, ""):
            raise WorkerFailed(Status.CALLER_NOT_ALLOWED, f"{caller} is not on caller_app_allow_list")
        if not allows(current.text("isolated_service_allow_list"), package, app.owner.certificate_digest):
            raise WorkerFailed(Status.CALLER_NOT_ALLOWED, f"{package} is not on isolated_service_allow_list")
        return _Standing(app, current, given, operation)

    def _surface(self, operation: _Operation, token: bytes) -> tuple[Surface, _Standing]:
        with self._database.write() as tx:
            surface = open_surface(sealing_key(tx), token)
        owner = surface.owner
        standing = self._standing(operation, owner.package, owner.class_name, surface.app_package)
        if standing.app.owner != owner:
            raise WorkerFailed(Status.INTERNAL, "a surface of an app that was installed under another certificate")
        if not standing.consent.protected_audience:
            raise WorkerFailed(Status.PERSONALIZATION_DISABLED, "protected audience consent is revoked")
        return surface, standing

    async def _call(
        self,
        standing: _Standing,
        request: Any,
        downloaded: Mapping[str, bytes] | None = None,
        *,
        seconds: float = math.inf,
    ) -> Any:
        """The hook's output, within `seconds` and the deadline of all operations; raises WorkerFailed."""
        app, rules, operation = standing.app, standing.flags, standing.operation
        if not app.code.is_dir():
            raise WorkerFailed(Status.LOADING_FAILED, f"{app.code}, from which it was installed, is not there")
        outside = Outside(
            database=self._database,
            user_data=lambda app: self._described(standing),
            schedule=self._schedule,
            cancel=self._cancel,
            event_url=self._event_url,
            writes_local=operation.name != "execute" or standing.consent.measurement,
            local_bytes_limit=rules.integer("local_data_bytes_limit"),
        )
        async with self._places:
            called = await call_worker(
                Service(str(app.code), app.owner.class_name),
                operation.name,
                request,
                Facilities(outside, app, operation.name, downloaded),
                seconds=min(seconds, rules.integer("isolated_service_deadline_seconds")),
                memory=rules.integer("isolated_service_memory_bytes"),
                strict=self._strict,
            )
        operation.printed = called.printed
        if isinstance(called.result, WorkerFailed):
            raise called.result
        return called.result

    def _described(self, standing: _Standing) -> UserData:
        data = self._user_data()
        listed = _listed(standing.flags, "platform_data_for_execute_allowlist", standing.app.owner)
        if not listed or standing.operation.name not in _SEES_APPS:
            return data
        with self._database.read() as tx:
            packages = {app.owner.package for app in list_apps(tx)}
        return replace(data, app_infos={package: AppInfo(is_installed=True) for package in sorted(packages)})

    def _event_url(
        self, app: App, parameters: Mapping[str, Any], data: bytes | None, mime_type: str | None, to: str | None
    ) -> str:
        with self._database.write() as tx:
            return event_url(sealing_key(tx), Event(app.owner.digest, dict(parameters), data, mime_type), to)

    def _best_value(self, standing: _Standing, caller: str, value: int, maximum: int | None) -> int:
        """The value that reaches the app (spec 7.2).

        Formal guarantees: for a service on `platform_data_for_execute_allowlist` the value is replaced, with the
        probability of `noise_for_execute_best_value`, by one drawn uniformly from the others below the maximum:
        randomized response. For any other service it passes as it is and protects nothing.
        """
        owner, rules = standing.app.owner, standing.flags
        pairs = rules.text("output_data_allow_list")
        if maximum is None or not allows_pair(pairs, (caller, ""), (owner.package, owner.certificate_digest)):
            return DEFAULT_BEST_VALUE
        if not _listed(rules, "platform_data_for_execute_allowlist", owner):
            return value
        if not 0 <= value <= maximum:
            return DEFAULT_BEST_VALUE
        others = maximum - (value < maximum)
        if others == 0 or self._chance.random() >= rules.number("noise_for_execute_best_value"):
            return value
        drawn = self._chance.randrange(others)
        return drawn + (drawn >= value)


def schedule_task(
    database: DeviceDatabase, app: App, population: str, recurrent: bool, minimum_interval: int, now: int
) -> None:
    """Schedules a task of an app; `minimum_interval`, `now`: milliseconds.

    Raises NotAnswered with the platform's status; the reason stands in the device's log too.
    """
    with database.write() as tx:
        server, status, refusal = _server(tx, app), Status.INTERNAL, None
        if not consent(tx).measurement:
            status, refusal = Status.PERSONALIZATION_DISABLED, Removal.CONSENT.value
        elif server is None:
            status, refusal = Status.FEDERATED_COMPUTE_MANIFEST_INVALID, "the manifest names no server"
        elif not _is_installed(tx, app):
            refusal = "the app was removed"
        else:
            request = ScheduleRequest(app.owner, population, server, recurrent, minimum_interval)
            refusal = schedule(tx, request, now, flags(tx))
        if refusal is not None:
            write_entry(tx, LogEntry(now, app.owner.digest, population, "not_scheduled", refusal))
    if refusal is not None:
        raise NotAnswered(status, refusal)


def _is_installed(tx: Transaction, app: App) -> bool:
    found = find_app(tx, app.owner.package, app.owner.class_name)
    return found is not None and found.owner == app.owner


def _consent_now(tx: Transaction, app: App) -> Consent:
    """What is allowed once the hook has answered; raises WorkerFailed where the app was removed meanwhile."""
    if not _is_installed(tx, app):
        raise WorkerFailed(Status.NAME_NOT_FOUND, f"{app.owner.id} was removed meanwhile")
    return consent(tx)


def _expanded(template: str, parameters: Mapping[str, str | int | float | bool]) -> str:
    """The template with `$name` and `${name}` replaced by escaped values; names without a value stay, `$$` is `$`.

    Raises WorkerFailed beyond HTML_CHARACTERS_LIMIT, before it takes the memory.
    """
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in parameters.items()}
    values = {name: html.escape(text) for name, text in texts.items()}
    names = (found["named"] or found["braced"] or "" for found in string.Template.pattern.finditer(template))
    size = len(template) + sum(len(values.get(name, "")) for name in names)
    if size > HTML_CHARACTERS_LIMIT:
        detail = f"on_render: a template that expands to {size} characters; {HTML_CHARACTERS_LIMIT} are the limit"
        raise WorkerFailed(Status.SERVICE_FAILED, detail)
    return string.Template(template).safe_substitute(values)


def _listed(rules: Flags, name: str, owner: Owner) -> bool:
    return allows(rules.text(name), owner.package, owner.certificate_digest)


def _server(tx: Transaction, app: App) -> str | None:
    """The server of an app's tasks: the one set for tests, else the manifest's; None if it is no URL."""
    rules, server = flags(tx), app.server
    if rules.text("override_fc_server_url_package") == app.owner.package:
        server = rules.text("override_fc_server_url") or server
    try:
        parts = urlsplit(server or "")
    except ValueError:
        return None
    return server if parts.scheme and parts.netloc else None
