"""What an app on this machine may ask of the services installed on it (spec/device.md 7.10)."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fedcompute.device.developer.errors import ErrorCode, IllegalState, OnDevicePersonalizationException, Status
from fedcompute.device.developer.log_records import ColumnValue
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.developer.worker import DEFAULT_BEST_VALUE, WebTriggerInput
from fedcompute.device.directory import DeviceDirectory
from fedcompute.device.isolation.worker_call import WorkerFailed
from fedcompute.device.jobs.flags import flags
from fedcompute.device.jobs.sensors import Places, read_conditions
from fedcompute.device.personalization import Personalization, UrlAnswer
from fedcompute.device.situation import user_data

_CODES = {
    Status.SERVICE_FAILED: ErrorCode.ISOLATED_SERVICE_FAILED,
    Status.PERSONALIZATION_DISABLED: ErrorCode.PERSONALIZATION_DISABLED,
    Status.MANIFEST_PARSING_FAILED: ErrorCode.ISOLATED_SERVICE_MANIFEST_PARSING_FAILED,
    Status.MANIFEST_MISCONFIGURED: ErrorCode.ISOLATED_SERVICE_MANIFEST_PARSING_FAILED,
    Status.NAME_NOT_FOUND: ErrorCode.ISOLATED_SERVICE_MANIFEST_PARSING_FAILED,
    Status.LOADING_FAILED: ErrorCode.ISOLATED_SERVICE_LOADING_FAILED,
    Status.SERVICE_TIMEOUT: ErrorCode.ISOLATED_SERVICE_TIMEOUT,
}
# What the service itself has to say of a failure stays on its side.
_NEUTRAL = {
    Status.SERVICE_FAILED: "the service failed",
    Status.LOADING_FAILED: "the service cannot be loaded",
    Status.SERVICE_TIMEOUT: "the service gave no answer in time",
}


@dataclass(frozen=True)
class OutputSpec:
    """What an app wants back beside a surface: nothing, or a value of 0 to `max_int_value`."""

    max_int_value: int | None = None


@dataclass(frozen=True)
class ExecuteInIsolatedServiceRequest:
    """One request. `service`: package and class of the service, as in `package/module.Class`."""

    service: str
    app_params: Mapping[str, ColumnValue] = field(default_factory=dict)
    output_spec: OutputSpec = field(default_factory=OutputSpec)


@dataclass(frozen=True)
class ExecuteInIsolatedServiceResponse:
    """`surface_package_token`: for `request_surface_package`, None if there is nothing to show. `best_value`: -1 where
    the service gave none or may give none.
    """

    surface_package_token: bytes | None
    best_value: int = DEFAULT_BEST_VALUE


@dataclass(frozen=True)
class SurfacePackage:
    """Rendered HTML, for a frame of the app's, and the token that its event URLs need."""

    html: str
    token: bytes = field(repr=False)


class OnDevicePersonalizationManager:
    """Reaches the services of one device directory for one app; an asynchronous context manager.

    Its methods raise OnDevicePersonalizationException with Android's code, IllegalState for what the platform does not
    allow, TypeError and ValueError for arguments that no service takes; and OperationFailed where the device's file or
    the kernel's isolation cannot be had. Why a service failed stands in `fedcompute device logs` and nowhere else.
    """

    def __init__(self, directory: Path, app_package: str, *, strict: bool = True) -> None:
        """`directory`: of the device. `app_package`: who asks. `strict`: refuse where isolation is not complete."""
        self._directory = directory
        self._app_package = app_package
        self._strict = strict

    async def __aenter__(self) -> Self:
        self._device = DeviceDirectory.open(self._directory)
        self._personalization = Personalization(
            self._device.database,
            clock=lambda: time.time_ns() // 1_000_000,
            user_data=self._user_data,
            strict=self._strict,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.close()

    async def execute(
        self, service: str, app_params: Mapping[str, ColumnValue] | None = None
    ) -> ExecuteInIsolatedServiceResponse:
        """Calls `on_execute` of a service, `package/module.Class`."""
        return await self.execute_in_isolated_service(ExecuteInIsolatedServiceRequest(service, app_params or {}))

    async def execute_in_isolated_service(
        self, request: ExecuteInIsolatedServiceRequest
    ) -> ExecuteInIsolatedServiceResponse:
        """Calls `on_execute`; the app gets a token and at most one number, whatever the service knows."""
        package, class_name = _component(request.service)
        with _platform_errors():
            done = await self._personalization.execute(
                package, class_name, self._app_package, request.app_params, request.output_spec.max_int_value
            )
        return ExecuteInIsolatedServiceResponse(done.surface_token, done.best_value)

    async def request_surface_package(self, token: bytes, width: int, height: int) -> SurfacePackage:
        """Renders what `execute` gave a token for, into `width` times `height` pixels."""
        with _platform_errors():
            return SurfacePackage(await self._personalization.render(token, width, height), token)

    async def open_url(self, surface: SurfacePackage, url: str) -> UrlAnswer:
        """Opens an `odp://` URL of a surface, as a browser does for an image or a click."""
        with _platform_errors():
            return await self._personalization.open_event_url(surface.token, url)

    async def web_trigger(self, service: str, destination_url: str, data: bytes = b"") -> None:
        """Tells a service what a web page asked to be kept; its `on_web_trigger` decides."""
        request = WebTriggerInput(destination_url, self._app_package, data)
        with _platform_errors():
            await self._personalization.web_trigger(*_component(service), request)

    def _user_data(self) -> UserData:
        with self._device.database.read() as tx:
            return user_data(read_conditions(flags(tx), Places(temporary=self._device.path)))


@contextmanager
def _platform_errors() -> Iterator[None]:
    try:
        yield
    except WorkerFailed as failed:
        status = failed.platform_status
        code, text = _CODES.get(status), _NEUTRAL.get(status, failed.detail)
        if code is None:
            raise IllegalState(f"{text} [{status.name.lower()}]") from None
        raise OnDevicePersonalizationException(code, text) from None


def _component(service: str) -> tuple[str, str]:
    package, _, class_name = service.partition("/")
    if not package or not class_name:
        raise ValueError(f"{service!r} is no service; write package/module.Class")
    return package, class_name
