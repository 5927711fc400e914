"""The service class: its factories, and what they make (spec/device.md 7.1)."""

import pytest

from fedcompute.device import (
    EventUrlProvider,
    FederatedComputeInput,
    FederatedComputeScheduler,
    IllegalState,
    IsolatedService,
    IsolatedWorker,
    KeyValueStore,
    LogReader,
    MutableKeyValueStore,
    Params,
    TrainingInterval,
    UserData,
)
from fedcompute.device.developer.connection import Refused
from fedcompute.device.developer.errors import Status


class Service(IsolatedService):
    def on_request(self, request_token):
        return IsolatedWorker()


def denied(method, arguments, kind):
    raise Refused(Status.PERMISSION_DENIED, f"render has no {method}")


def test_a_service_without_on_request_cannot_be_made():
    with pytest.raises(TypeError, match="on_request"):
        type("Unfinished", (IsolatedService,), {})()


def test_making_a_facility_asks_nothing_and_never_fails():
    def ask(*question):
        raise AssertionError(f"asked {question}")

    service = Service()
    made = [
        service.get_remote_data(ask),
        service.get_local_data(ask),
        service.get_log_reader(ask),
        service.get_federated_compute_scheduler(ask),
        service.get_event_url_provider(ask),
    ]
    kinds = [KeyValueStore, MutableKeyValueStore, LogReader, FederatedComputeScheduler, EventUrlProvider]
    assert [type(one) for one in made] == kinds


def test_remote_data_is_not_local_data():
    asked = []
    service = Service()
    service.get_remote_data(lambda *question: asked.append(question[0])).get("k")
    service.get_local_data(lambda *question: asked.append(question[0])).get("k")
    assert asked == ["remote_data.get", "local_data.get"]


def test_user_data_is_there_or_none():
    data = UserData(battery_percentage=5)
    assert Service().get_user_data(lambda *question: data) is data
    assert Service().get_user_data(denied) is None


def test_a_facility_that_the_operation_lacks_fails_when_it_is_used():
    service = Service()
    assert service.get_local_data(denied).get("k") is None
    scheduler = service.get_federated_compute_scheduler(denied)
    with pytest.raises(IllegalState, match=r"render has no scheduler\.schedule"):
        scheduler.schedule(Params(TrainingInterval()), FederatedComputeInput("p"))


class Urls:
    def __init__(self):
        self.questions = []

    def __call__(self, method, arguments, kind):
        self.questions.append((method, *arguments))
        return "odp://localhost?e=x"


def test_event_urls_carry_their_parameters_and_what_they_answer_with():
    asked = Urls()
    urls = Service().get_event_url_provider(asked)
    urls.create_event_tracking_url_with_response({"n": 1}, b"pixel", "image/gif")
    urls.create_event_tracking_url_with_response({})
    urls.create_event_tracking_url_with_redirect({"n": 2}, "https://example.com")
    assert asked.questions == [
        ("event_urls.create", {"n": 1}, b"pixel", "image/gif", None),
        ("event_urls.create", {}, None, None, None),
        ("event_urls.create", {"n": 2}, None, None, "https://example.com"),
    ]


@pytest.mark.parametrize("destination", [None, ""])
def test_a_redirect_leads_somewhere(destination):
    asked = Urls()
    with pytest.raises(TypeError, match="a redirect needs a destination"):
        Service().get_event_url_provider(asked).create_event_tracking_url_with_redirect({}, destination)
    assert asked.questions == []


def test_parameters_of_an_event_are_columns():
    asked = Urls()
    urls = Service().get_event_url_provider(asked)
    with pytest.raises(TypeError, match="column 'a' holds list"):
        urls.create_event_tracking_url_with_response({"a": [1]})
    with pytest.raises(TypeError, match="column 'a' holds dict"):
        urls.create_event_tracking_url_with_redirect({"a": {}}, "https://example.com")
    assert asked.questions == []


def test_a_url_that_is_not_made_is_an_illegal_state():
    urls = Service().get_event_url_provider(denied)
    with pytest.raises(IllegalState, match=r"render has no event_urls\.create"):
        urls.create_event_tracking_url_with_response({})
