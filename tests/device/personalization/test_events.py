"""Events of what was shown, and web triggers."""

from dataclasses import replace

from fedcompute.device.developer.errors import Status
from fedcompute.device.owner import Owner

OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
CALLER = "org.example.caller"


LINKS = """
def on_execute(self, request):
    return ExecuteOutput(RequestLogRecord([{"id": 1}, {"id": 2}]), RenderingConfig([]))

def on_render(self, request):
    make = self.urls.create_event_tracking_url_with_response
    urls = [make({"row": row, "type": kind}, b"GIF", "image/gif") for row, kind in ((0, 1), (1, 1), (1, 2), (5, 1))]
    urls.append(make({"row": 0, "type": 1}))
    urls.append(self.urls.create_event_tracking_url_with_redirect({"row": 0, "type": 9}, "https://shop.example/?a=b&c"))
    return RenderOutput(content=chr(10).join(urls))

def on_event(self, request):
    print("rows", request.request_log_record and request.request_log_record.rows)
    return EventOutput(EventLogRecord(row_index=request.parameters["row"], type=request.parameters["type"]))
"""

TRIGGERED = """
def on_web_trigger(self, request):
    return WebTriggerOutput(RequestLogRecord([{"page": request.destination_url}]), [EventLogRecord(type=3)])
"""


def test_an_event_url_answers_and_its_event_is_kept_once_for_each_row_and_type(bench):
    bench.install(LINKS)
    token = bench.execute().surface_token
    image, second, click, beyond, empty, link = bench.render(token).splitlines()
    answer = bench.open(token, image)
    assert (answer.data, answer.mime_type, answer.destination) == (b"GIF", "image/gif", None)
    for url in (image, second, second, click, beyond):
        bench.open(token, url)
    assert bench.open(token, empty).data is None
    assert bench.open(token, link).destination == "https://shop.example/?a=b&c"
    # The fourth one's row is not there; what the empty one stands for was kept before.
    assert bench.events() == [(1, 0, 1), (1, 1, 1), (1, 1, 2), (1, 0, 9)]
    assert bench.entries()[-1].output == "rows [{'id': 1}, {'id': 2}]\n"


def test_an_event_without_measurement_consent_is_answered_and_not_kept(bench):
    bench.install(LINKS)
    token = bench.execute().surface_token
    image = bench.render(token).splitlines()[0]
    bench.revoke("measurement")
    assert bench.open(token, image).data == b"GIF"
    assert bench.events() == []


def test_an_event_url_belongs_to_one_service_and_cannot_be_changed(bench):
    bench.install(LINKS)
    token = bench.execute().surface_token
    image = bench.render(token).splitlines()[0]
    for bad in (image[:-6], image.replace("e=", "e=A"), image.replace("odp://", "https://"), "odp://[", "", "x" * 9999):
        assert bench.refused(bench.open, token, bad).platform_status == Status.INTERNAL
    # The same component under another certificate is another service.
    bench.install(LINKS, owner=replace(OWNER, certificate_digest="CD" * 32))
    assert bench.refused(bench.open, token, image).platform_status == Status.INTERNAL
    assert bench.events() == []


def test_a_web_trigger_leaves_records_of_the_app_that_saw_the_page(bench):
    bench.install(TRIGGERED)
    bench.web_trigger()
    assert (bench.requests(), bench.events()) == (["org.example.browser"], [(1, 0, 3)])


def test_a_web_trigger_needs_measurement_consent_and_a_caller_on_the_list(bench):
    bench.install(TRIGGERED)
    bench.flag("caller_app_allow_list", CALLER)
    assert bench.refused(bench.web_trigger).platform_status == Status.CALLER_NOT_ALLOWED
    bench.revoke("measurement")
    assert bench.refused(bench.web_trigger, CALLER).platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.requests() == []
