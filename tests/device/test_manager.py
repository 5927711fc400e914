"""What apps on the machine get from the services installed on it, and what they are told where they get nothing."""

import asyncio
import traceback

import pytest

from fedcompute.device.developer.errors import ErrorCode, IllegalState, OnDevicePersonalizationException
from fedcompute.device.directory import DeviceDirectory
from fedcompute.device.jobs.flags import put_flag
from fedcompute.device.manager import (
    ExecuteInIsolatedServiceRequest,
    ExecuteInIsolatedServiceResponse,
    OnDevicePersonalizationManager,
    OutputSpec,
)
from fedcompute.device.owner import Owner
from fedcompute.device.state.apps import App, install
from fedcompute.device.state.device_log import read_entries
from fedcompute.device.state.settings import set_consent
from fedcompute.errors import OperationFailed, Reason

OWNER = Owner("org.example.app", "org.example.app.Service")
SERVICE, CALLER = OWNER.id, "org.example.caller"

HOOKS = """
def on_execute(self, request):
    asked = request.app_params.get("do")
    if asked == "raise":
        raise type("secret_of_the_user", (Exception,), {})("12345")
    if asked == "hang":
        time.sleep(60)
    if asked == "key":
        return ExecuteOutput(rendering_config=RenderingConfig(["secret_of_the_user"]))
    return ExecuteOutput(
        RequestLogRecord([request.app_params]), RenderingConfig(), output_data=b"secret_of_the_user", best_value=4
    )

def on_render(self, request):
    link = self.urls.create_event_tracking_url_with_redirect({"place": 1}, "https://shop.example/")
    return RenderOutput(content=f"{request.width}x{request.height} {link}")

def on_event(self, request):
    return EventOutput(EventLogRecord(data=request.parameters))

def on_web_trigger(self, request):
    return WebTriggerOutput(RequestLogRecord([{"url": request.destination_url, "data": request.data}]))
"""


@pytest.fixture
def device(tmp_path, write_service):
    opened = DeviceDirectory.open(tmp_path / "device")
    with opened.database.write() as tx:
        install(tx, App(OWNER, write_service(tmp_path / "app", HOOKS)), 0)
    yield opened
    opened.close()


def as_app(device, use, caller=CALLER):
    """What `use` returns, of a manager for this app."""

    async def run():
        async with OnDevicePersonalizationManager(device.path, caller) as manager:
            return await use(manager)

    return asyncio.run(run())


def flag(device, name, value):
    with device.database.write() as tx:
        put_flag(tx, name, value)


def rows(device, statement):
    with device.database.read() as tx:
        return tx.execute(statement).fetchall()


def test_an_app_shows_what_it_does_not_see_and_its_clicks_become_events(device):
    async def use(manager):
        answer = await manager.execute(SERVICE, {"label": 1})
        surface = await manager.request_surface_package(answer.surface_package_token, 320, 240)
        size, link = surface.html.split()
        return answer, surface, size, await manager.open_url(surface, link)

    answer, surface, size, clicked = as_app(device, use)
    assert (answer.best_value, size, clicked.destination) == (-1, "320x240", "https://shop.example/")
    assert rows(device, "SELECT app_package FROM request_log") == [(CALLER,)]
    assert rows(device, "SELECT request_id, type FROM event_log") == [(1, 1)]
    assert answer.surface_package_token.decode() not in repr(surface)


def test_an_app_gets_at_most_a_token_and_a_value(device):
    flag(device, "output_data_allow_list", f"{CALLER};{OWNER.package}")
    request = ExecuteInIsolatedServiceRequest(SERVICE, {}, OutputSpec(max_int_value=9))
    answer = as_app(device, lambda manager: manager.execute_in_isolated_service(request))
    assert answer == ExecuteInIsolatedServiceResponse(answer.surface_package_token, 4)
    assert "secret_of_the_user" not in repr(answer)
    assert as_app(device, lambda manager: manager.execute_in_isolated_service(request), "other").best_value == -1


def test_a_web_page_reaches_a_service(device):
    as_app(device, lambda manager: manager.web_trigger(SERVICE, "https://shop.example/", b"\x00"))
    assert rows(device, "SELECT app_package, row_count FROM request_log") == [(CALLER, 1)]


def refusal(device, use, kind=OnDevicePersonalizationException, **options):
    with pytest.raises(kind) as failure:
        as_app(device, use, **options)
    # An app that logs its errors must not log what a service knows.
    told = "".join(traceback.format_exception(failure.value))
    assert "secret_of_the_user" not in told
    assert "12345" not in told
    return failure.value


@pytest.mark.parametrize("asked", ["raise", "key"])
def test_a_service_that_fails_tells_its_app_nothing_but_that(device, asked):
    error = refusal(device, lambda manager: manager.execute(SERVICE, {"do": asked}))
    assert (error.code, str(error)) == (
        ErrorCode.ISOLATED_SERVICE_FAILED,
        "the service failed [isolated_service_failed]",
    )
    with device.database.read() as tx:
        assert "secret_of_the_user" in read_entries(tx)[0].detail


def test_a_service_that_hangs_is_a_timeout(device):
    flag(device, "isolated_service_deadline_seconds", "1")
    error = refusal(device, lambda manager: manager.execute(SERVICE, {"do": "hang"}))
    assert error.code == ErrorCode.ISOLATED_SERVICE_TIMEOUT


def test_code_that_cannot_be_loaded_is_a_loading_failure(device, tmp_path):
    (tmp_path / "app" / "service.py").write_text("raise KeyError('secret_of_the_user')")
    error = refusal(device, lambda manager: manager.execute(SERVICE))
    assert error.code == ErrorCode.ISOLATED_SERVICE_LOADING_FAILED


def test_a_service_that_is_not_installed_is_a_manifest_failure(device):
    error = refusal(device, lambda manager: manager.execute("org.example.app/org.example.app.Other"))
    assert error.code == ErrorCode.ISOLATED_SERVICE_MANIFEST_PARSING_FAILED


def test_without_consent_or_under_the_kill_switch_personalization_is_disabled(device):
    token = as_app(device, lambda manager: manager.execute(SERVICE)).surface_package_token
    with device.database.write() as tx:
        set_consent(tx, "protected_audience", False, 0)
    error = refusal(device, lambda manager: manager.request_surface_package(token, 1, 1))
    assert error.code == ErrorCode.PERSONALIZATION_DISABLED
    assert as_app(device, lambda manager: manager.execute(SERVICE)).surface_package_token is None
    flag(device, "global_kill_switch", "true")
    error = refusal(device, lambda manager: manager.execute(SERVICE))
    assert error.code == ErrorCode.PERSONALIZATION_DISABLED


def test_what_the_platform_does_not_allow_is_an_illegal_state(device):
    refusal(device, lambda manager: manager.request_surface_package(b"made up", 1, 1), IllegalState)
    flag(device, "caller_app_allow_list", CALLER)
    error = refusal(device, lambda manager: manager.execute(SERVICE), IllegalState, caller="other")
    assert "caller_app_allow_list" in str(error)


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (lambda manager: manager.execute("org.example.app.Service"), ValueError),
        (lambda manager: manager.execute("/org.example.app.Service"), ValueError),
        (lambda manager: manager.execute(SERVICE, {"big": 1 << 63}), ValueError),
        (lambda manager: manager.execute(SERVICE, {"list": []}), TypeError),
        (lambda manager: manager.request_surface_package(b"", 0, 1), ValueError),
        (
            lambda manager: manager.execute_in_isolated_service(
                ExecuteInIsolatedServiceRequest(SERVICE, {}, OutputSpec(101))
            ),
            ValueError,
        ),
    ],
)
def test_arguments_that_no_service_takes_are_argument_errors(device, use, kind):
    with pytest.raises(kind):
        as_app(device, use)


def test_a_directory_that_is_none_is_a_storage_failure(tmp_path):
    (tmp_path / "file").write_text("")

    async def run():
        async with OnDevicePersonalizationManager(tmp_path / "file", CALLER):
            pass

    with pytest.raises(OperationFailed) as failure:
        asyncio.run(run())
    assert failure.value.reason == Reason.STORAGE_FAILED
