"""Operators on an address of their own: nothing of theirs is on the devices', and the other way round."""

import threading
import time

import httpx
import pytest

from fedcompute.app import server as http_server
from fedcompute.errors import OperationFailed
from fedcompute.server.listening import listen
from fedcompute.server.security.operators import opens_without_key
from fedcompute.server.settings import Settings

DEVICE_PATHS = ("/.well-known/odp/v1/public-keys",)
OPERATOR_PATHS = (
    "/",
    "/system",
    "/api/v1/tasks",
    "/metrics",
    "/login",
    "/static/dashboard.css",
    "/api/v1/openapi.json",
)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """The devices' URL and the operators' of one server whose devices come from anywhere."""
    sockets = [listen("0.0.0.0", 0), listen("127.0.0.1", 0)]
    ports = [one.getsockname()[1] for one in sockets]
    directory = tmp_path_factory.mktemp("data")
    settings = Settings(data_dir=directory, host="0.0.0.0", port=ports[0], operator_port=ports[1], workers=1)
    running = http_server(settings)
    thread = threading.Thread(target=running.run, kwargs={"sockets": sockets})
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield [f"http://127.0.0.1:{port}" for port in ports]
    running.should_exit = True
    thread.join(30)
    for port in ports:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/healthz")


@pytest.mark.parametrize("path", OPERATOR_PATHS)
def test_what_is_for_operators_is_on_their_address_alone(addresses, path):
    devices, operators = addresses
    assert httpx.get(operators + path).status_code == 200
    refused = httpx.get(devices + path)
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", DEVICE_PATHS)
def test_what_is_for_devices_is_on_their_address_alone(addresses, path):
    devices, operators = addresses
    assert httpx.get(devices + path).status_code == 200
    assert httpx.get(operators + path).status_code == 404
    check_in = "/taskassignment/v1/population/digits:create-task-assignment"
    headers = {"content-type": "application/x-protobuf"}
    assert httpx.post(devices + check_in, headers=headers).status_code == 400
    assert httpx.post(operators + check_in, headers=headers).status_code == 404


def test_both_tell_their_health(addresses):
    for address in addresses:
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert httpx.get(f"{address}/ready").status_code == 200


def test_no_header_opens_the_operators_routes_to_the_devices_address(addresses):
    devices, operators = addresses
    authority = operators.removeprefix("http://")
    for headers in ({"host": authority}, {"x-forwarded-host": authority, "x-forwarded-port": authority[-5:]}):
        assert httpx.get(f"{devices}/api/v1/tasks", headers=headers).status_code == 404


def test_operators_of_a_loopback_address_need_no_key_whoever_the_devices_are(addresses):
    assert httpx.get(f"{addresses[1]}/api/v1/caller").json()["role"] == "operator"
    # A page whose name was pointed here does.
    assert httpx.get(f"{addresses[1]}/api/v1/caller", headers={"host": "evil.example"}).status_code == 401


@pytest.mark.parametrize(
    ("changes", "opens"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "operator_port": 1}, True),
        ({"public_url": "https://example.org", "operator_port": 1}, True),
        ({"operator_port": 1, "operator_host": "0.0.0.0"}, False),
        ({"operator_port": 1, "require_api_keys": True}, False),
        ({"operator_port": 1, "trusted_proxies": "127.0.0.1"}, False),
    ],
)
def test_a_key_is_needed_where_operators_can_be_reached_from_elsewhere(tmp_path, changes, opens):
    assert opens_without_key(Settings(data_dir=tmp_path, **changes)) == opens


def test_one_port_cannot_be_both(tmp_path):
    with pytest.raises(OperationFailed, match="operator_port"):
        Settings(data_dir=tmp_path, port=8080, operator_port=8080)
