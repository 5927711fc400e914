"""What services may do, and what is done with their answers: real workers in isolation, a real device's file."""

import asyncio
import os
import random
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.developer.worker import TrainingExampleInput, WebTriggerInput
from fedcompute.device.facilities import NotAnswered
from fedcompute.device.isolation.worker_call import WorkerFailed
from fedcompute.device.jobs.flags import put_flag
from fedcompute.device.owner import Owner
from fedcompute.device.personalization import HTML_CHARACTERS_LIMIT, Personalization, schedule_task
from fedcompute.device.state import key_values, log_records, tasks
from fedcompute.device.state.apps import App, install, uninstall
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.device_log import read_entries
from fedcompute.device.state.settings import set_consent

NOW = 1_700_000_000_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
SERVER = "https://learn.example"
CALLER = "org.example.caller"
EVER = (0, 1 << 50)


class Bench:
    """A device's file with one app, and the operations on it."""

    def __init__(self, folder, write_service):
        self.folder, self._write_service = folder, write_service
        self.database = DeviceDatabase(folder / "device.db")
        self.operations = self.made()
        self.app = App(OWNER, folder / "app", SERVER)

    def made(self, **changes):
        given = {"clock": lambda: NOW, "user_data": lambda: UserData(carrier="carrier", battery_percentage=77)}
        return Personalization(self.database, **{**given, **changes})

    def install(self, hooks="", **changes):
        self.app = replace(self.app, code=self._write_service(self.folder / "app", hooks), **changes)
        with self.database.write() as tx:
            install(tx, self.app, NOW)

    def flag(self, name, value):
        with self.database.write() as tx:
            put_flag(tx, name, str(value))

    def revoke(self, *names):
        with self.database.write() as tx:
            for name in names:
                set_consent(tx, name, False, NOW)

    def remote(self, **values):
        with self.database.write() as tx:
            for key, value in values.items():
                key_values.put_value(tx, "remote_data", self.app.owner, key, value)

    def values(self, table):
        with self.database.read() as tx:
            keys = key_values.key_set(tx, table, self.app.owner)
            return {key: key_values.get_value(tx, table, self.app.owner, key) for key in keys}

    def schedule(self, population="digits"):
        schedule_task(self.database, self.app, population, False, 0, NOW)

    def task(self, population="digits"):
        with self.database.read() as tx:
            return tasks.find(tx, self.app.owner.job_id(population))

    def entries(self):
        with self.database.read() as tx:
            return read_entries(tx)

    def requests(self):
        with self.database.read() as tx:
            return [row[0] for row in tx.execute("SELECT app_package FROM request_log ORDER BY id")]

    def events(self):
        with self.database.read() as tx:
            return tx.execute("SELECT request_id, row_index, type FROM event_log ORDER BY id").fetchall()

    def execute(self, maximum=None, caller=CALLER, **params):
        return asyncio.run(self.operations.execute(OWNER.package, OWNER.class_name, caller, params, maximum))

    def render(self, token, width=320, height=240):
        return asyncio.run(self.operations.render(token, width, height))

    def open(self, token, url):
        return asyncio.run(self.operations.open_event_url(token, url))

    def web_trigger(self, caller="org.example.browser"):
        request = WebTriggerInput("https://shop.example/", caller, b"data")
        return asyncio.run(self.operations.web_trigger(OWNER.package, OWNER.class_name, request))

    def download(self, contents, sync_token=3600):
        return asyncio.run(self.operations.complete_download(self.app, contents, sync_token))

    def examples(self, population="digits", owner=OWNER, **request):
        request = TrainingExampleInput(population, "3", **request)
        return asyncio.run(self.operations.training_examples(owner, request)).training_example_records


@pytest.fixture
def bench(tmp_path, write_service):
    made = Bench(tmp_path, write_service)
    yield made
    made.database.close()


def refused(function, *arguments, **options):
    with pytest.raises(WorkerFailed) as failure:
        function(*arguments, **options)
    return failure.value


RECORDS = """
def on_execute(self, request):
    print("asked", dict(request.app_params))
    self.local.put("seen", b"1")
    return ExecuteOutput(
        request_log_record=RequestLogRecord([{"shown": 1}, {"shown": 2}]),
        rendering_config=RenderingConfig(["greeting"]) if "greeting" in self.remote.key_set() else None,
        event_log_records=[EventLogRecord(row_index=1, type=7), EventLogRecord(row_index=2)],
        output_data=b"what the service knows",
        best_value=5,
    )
"""


# Execute


def test_an_app_gets_a_token_where_there_is_something_to_show_and_the_device_keeps_the_records(bench):
    bench.install(RECORDS)
    answer = bench.execute(color="red")
    assert (answer.surface_token, answer.best_value) == (None, -1)
    assert bench.requests() == [CALLER]
    # The second event's row is not there.
    assert bench.events() == [(1, 1, 7)]
    assert bench.values("local_data") == {"seen": b"1"}
    bench.remote(greeting=b"hello")
    answer = bench.execute()
    assert b"greeting" not in answer.surface_token
    assert vars(answer).keys() == {"surface_token", "best_value"}
    (first, _) = bench.entries()
    assert (first.owner, first.subject, first.outcome, first.detail) == (OWNER.digest, "on_execute", "ok", "")
    assert first.output == "asked {'color': 'red'}\n"


def test_without_measurement_consent_an_execution_leaves_nothing_on_the_device(bench):
    bench.install(RECORDS)
    bench.remote(greeting=b"hello")
    bench.revoke("measurement")
    assert bench.execute(color="red").surface_token is not None
    assert (bench.requests(), bench.events(), bench.values("local_data")) == ([], [], {})
    assert [(entry.outcome, entry.output) for entry in bench.entries()] == [("ok", "")]


def test_without_protected_audience_consent_an_app_gets_neither_token_nor_value(bench):
    bench.install(RECORDS)
    bench.remote(greeting=b"hello")
    bench.flag("output_data_allow_list", f"{CALLER};{OWNER.package}")
    assert bench.execute(maximum=9).best_value == 5
    bench.revoke("protected_audience")
    answer = bench.execute(maximum=9)
    assert (answer.surface_token, answer.best_value) == (None, -1)
    assert len(bench.requests()) == 2


SLOW = """
def on_execute(self, request):
    print("of the user")
    self.local.put("began", b"")
    time.sleep(0.4)
    return ExecuteOutput(request_log_record=RequestLogRecord([{}]), best_value=5)
"""


def while_it_runs(bench, change):
    async def both():
        asking = asyncio.create_task(bench.operations.execute(OWNER.package, OWNER.class_name, CALLER, {}, 9))
        while "began" not in bench.values("local_data"):
            await asyncio.sleep(0.01)
        change()
        return await asking

    return asyncio.run(both())


def test_consent_revoked_while_a_hook_runs_counts_for_what_the_hook_returns(bench):
    bench.install(SLOW)
    bench.flag("output_data_allow_list", "*")
    answer = while_it_runs(bench, lambda: bench.revoke("measurement", "protected_audience"))
    assert (answer.best_value, bench.requests()) == (-1, [])


def test_nothing_is_stored_for_an_app_that_was_removed_while_its_hook_ran(bench):
    bench.install(SLOW)

    def remove():
        with bench.database.write() as tx:
            uninstall(tx, OWNER)

    assert refused(while_it_runs, bench, remove).platform_status == Status.NAME_NOT_FOUND
    assert (bench.requests(), bench.values("local_data")) == ([], {})
    assert [(entry.owner, entry.output) for entry in bench.entries()] == [(None, "")]


@pytest.mark.parametrize(
    ("flag", "value", "status"),
    [
        ("global_kill_switch", "true", Status.PERSONALIZATION_DISABLED),
        ("caller_app_allow_list", "org.example.other", Status.CALLER_NOT_ALLOWED),
        ("caller_app_allow_list", "", Status.CALLER_NOT_ALLOWED),
        ("isolated_service_allow_list", "org.example.other, org.example.app:" + "CD" * 32, Status.CALLER_NOT_ALLOWED),
    ],
)
def test_no_code_runs_for_those_whom_the_rules_exclude(bench, flag, value, status):
    bench.install("def on_execute(self, request): print('ran')")
    bench.flag(flag, value)
    assert refused(bench.execute).platform_status == status
    (entry,) = bench.entries()
    assert (entry.owner, entry.outcome, entry.output) == (OWNER.digest, status.name.lower(), "")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("caller_app_allow_list", f"org.example.other, {CALLER}"),
        ("isolated_service_allow_list", f"org.example.app:{'AB' * 32}"),
        ("isolated_service_allow_list", "org.example.app"),
    ],
)
def test_those_on_the_lists_may(bench, flag, value):
    bench.install()
    bench.flag(flag, value)
    assert bench.execute().surface_token is None


def test_a_service_that_is_not_installed_is_named(bench):
    failure = refused(bench.execute)
    assert failure.platform_status == Status.NAME_NOT_FOUND
    assert OWNER.id in failure.detail
    (entry,) = bench.entries()
    assert (entry.owner, entry.subject, entry.outcome) == (None, "on_execute", "name_not_found")


def test_keys_to_render_must_be_in_remote_data_or_nothing_is_kept(bench):
    bench.install(
        """
        def on_execute(self, request):
            return ExecuteOutput(RequestLogRecord([{}]), RenderingConfig(["there", "gone"]))
        """
    )
    bench.remote(there=b"")
    failure = refused(bench.execute)
    assert (failure.platform_status, "'gone'" in failure.detail) == (Status.SERVICE_FAILED, True)
    assert bench.requests() == []
    assert [entry.outcome for entry in bench.entries()] == ["service_failed"]


def test_a_failing_hook_leaves_one_entry_with_its_traceback_and_counts_its_code(bench):
    bench.install("def on_execute(self, request): raise IsolatedServiceException(7, 'of user 12345')")
    failure = refused(bench.execute)
    assert (failure.platform_status, failure.code) == (Status.SERVICE_FAILED, 7)
    (entry,) = bench.entries()
    assert entry.outcome == "service_failed"
    assert "of user 12345" in entry.output
    assert "12345" not in entry.detail + failure.detail
    with bench.database.read() as tx:
        assert tx.execute("SELECT owner, code, count FROM error_count").fetchall() == [(OWNER.digest, 7, 1)]


def test_a_hook_that_hangs_ends_at_the_deadline_and_shows_where(bench):
    bench.install("def on_execute(self, request): time.sleep(60)")
    bench.flag("isolated_service_deadline_seconds", 1)
    start = time.monotonic()
    assert refused(bench.execute).platform_status == Status.SERVICE_TIMEOUT
    assert time.monotonic() - start < 10
    (entry,) = bench.entries()
    assert (entry.outcome, "in on_execute" in entry.output) == ("service_timeout", True)


def test_code_that_cannot_be_loaded_is_told_apart(bench):
    bench.install()
    (bench.folder / "app" / "service.py").write_text("import nothing_of_that_name")
    assert refused(bench.execute).platform_status == Status.LOADING_FAILED
    assert "nothing_of_that_name" in bench.entries()[0].output


def test_a_service_whose_folder_is_gone_is_told_apart(bench):
    bench.install()
    with bench.database.write() as tx:
        install(tx, replace(bench.app, code=bench.folder / "gone"), NOW)
    failure = refused(bench.execute)
    assert (failure.platform_status, str(bench.folder / "gone") in failure.detail) == (Status.LOADING_FAILED, True)


# Values


def valued(bench, value, noise="0.1", seen=True):
    bench.install(f"def on_execute(self, request): return ExecuteOutput(best_value={value})")
    bench.flag("output_data_allow_list", f"{CALLER};{OWNER.package}:{OWNER.certificate_digest}")
    bench.flag("noise_for_execute_best_value", noise)
    bench.flag("platform_data_for_execute_allowlist", OWNER.package if seen else "")


@pytest.mark.parametrize(
    ("pairs", "caller", "maximum", "expected"),
    [
        (f"{CALLER};org.example.app", CALLER, 9, 5),
        (f"a;b, {CALLER};org.example.app:{'AB' * 32}", CALLER, 9, 5),
        ("*", CALLER, 9, 5),
        (f"{CALLER};org.example.app", CALLER, None, -1),
        (f"{CALLER};org.example.app", "org.example.other", 9, -1),
        (f"{CALLER};org.example.app:{'CD' * 32}", CALLER, 9, -1),
        ("", CALLER, 9, -1),
        # Of a service that does not see the device's apps the value passes as it is.
        (f"{CALLER};org.example.app", CALLER, 3, 5),
    ],
)
def test_a_value_reaches_only_apps_on_the_list_of_pairs_that_ask_for_one(bench, pairs, caller, maximum, expected):
    valued(bench, 5, noise="1", seen=False)
    bench.flag("output_data_allow_list", pairs)
    assert bench.execute(maximum, caller).best_value == expected


class Chance(random.Random):
    """Draws `first` where a probability is asked for."""

    def __init__(self, first):
        super().__init__(1)
        self.first = first

    def random(self):
        return self.first


@pytest.mark.parametrize(("first", "noised"), [(0.0999, True), (0.1, False)])
def test_the_value_of_a_service_that_sees_apps_is_noised_with_the_probability_of_the_flag(bench, first, noised):
    valued(bench, 5)
    bench.operations = bench.made(chance=Chance(first))
    assert (bench.execute(9).best_value != 5) == noised


@pytest.mark.parametrize(
    ("value", "maximum", "others"),
    [(1, 3, {0, 2}), (3, 3, {0, 1, 2}), (0, 2, {1}), (0, 1, {0}), (0, 0, {0}), (1, 1, {0}), (4, 3, {-1})],
)
def test_noise_draws_from_the_other_values_below_the_maximum(bench, value, maximum, others):
    valued(bench, value, noise="1")
    bench.operations = bench.made(chance=random.Random(4))
    drawn = {bench.execute(maximum).best_value for _ in range(8 if len(others) > 1 else 2)}
    assert drawn == others


def test_the_largest_value_is_bounded_by_its_flag_and_a_large_bound_takes_no_memory(bench):
    valued(bench, 5, noise="1")
    for maximum in (-1, 101):
        with pytest.raises(ValueError, match="not 0 to 100"):
            bench.execute(maximum)
    bench.flag("max_int_values_limit", (1 << 31) - 1)
    assert 0 <= bench.execute((1 << 31) - 1).best_value < (1 << 31) - 1


# Surfaces

SHOWS = """
def on_execute(self, request):
    return ExecuteOutput(RequestLogRecord([{"id": 1}, {"id": 2}]), RenderingConfig(["greeting"]))

def on_render(self, request):
    params = {"who": "<b>'A&B'</b>", "width": request.width, "yes": True}
    if self.remote.get("content"):
        return RenderOutput(content=f"{request.rendering_config.keys} {request.height}")
    key = self.remote.get("template")
    return RenderOutput(template_id=key and key.decode(), template_params=params)

def on_event(self, request):
    print("rows", request.request_log_record and request.request_log_record.rows)
    return EventOutput(EventLogRecord(row_index=request.parameters["row"], type=request.parameters["type"]))

def on_web_trigger(self, request):
    return WebTriggerOutput(RequestLogRecord([{"page": request.destination_url}]), [EventLogRecord(type=3)])
"""


def shown(bench, **remote):
    bench.install(SHOWS)
    bench.remote(greeting=b"<p title='$who'>$who ${width}px, $yes $unknown $$5</p>", **remote)
    return bench.execute().surface_token


def test_content_is_shown_as_it_is(bench):
    token = shown(bench, content=b"1")
    assert bench.render(token) == "['greeting'] 240"


def test_a_template_is_filled_with_escaped_values(bench):
    token = shown(bench, template=b"greeting")
    person = "&lt;b&gt;&#x27;A&amp;B&#x27;&lt;/b&gt;"
    assert bench.render(token) == f"<p title='{person}'>{person} 320px, true $unknown $5</p>"


@pytest.mark.parametrize("template", [{}, {"template": b"gone"}], ids=["neither", "gone"])
def test_a_surface_without_content_fails_the_service(bench, template):
    token = shown(bench, **template)
    assert refused(bench.render, token).platform_status == Status.SERVICE_FAILED
    assert [entry.outcome for entry in bench.entries()] == ["ok", "service_failed"]


def test_a_template_that_would_fill_the_memory_is_refused(bench):
    bench.install(
        """
        def on_execute(self, request): return ExecuteOutput(rendering_config=RenderingConfig(["t"]))
        def on_render(self, request): return RenderOutput(template_id="t", template_params={"x": "x" * 1_000_000})
        """
    )
    bench.remote(t=b"$x" * 1_000_000)
    failure = refused(bench.render, bench.execute().surface_token)
    assert (failure.platform_status, str(HTML_CHARACTERS_LIMIT) in failure.detail) == (Status.SERVICE_FAILED, True)


@pytest.mark.parametrize(("width", "height"), [(0, 240), (320, 0), (-1, 240)])
def test_a_frame_without_room_is_an_argument_error(bench, width, height):
    with pytest.raises(ValueError, match="pixels"):
        bench.render(b"", width, height)


def test_only_tokens_that_this_device_made_open_and_only_with_consent(bench, tmp_path, write_service):
    token = shown(bench, content=b"1")
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other", write_service)
    foreign = shown(other, content=b"1")
    other.database.close()
    changed = bytes([*token[:-5], token[-5] ^ 1, *token[-4:]])
    for bad in (foreign, changed, token[:-8], b"", b"\xff", b"odp://localhost?e=" + token):
        assert refused(bench.render, bad).platform_status == Status.INTERNAL
        assert refused(bench.open, bad, "odp://localhost?e=x").platform_status == Status.INTERNAL
    bench.revoke("protected_audience")
    assert refused(bench.render, token).platform_status == Status.PERSONALIZATION_DISABLED
    assert refused(bench.open, token, "odp://localhost?e=x").platform_status == Status.PERSONALIZATION_DISABLED


def test_a_surface_outlives_neither_its_app_nor_its_caller_s_place_on_the_list(bench):
    token = shown(bench, content=b"1")
    bench.flag("caller_app_allow_list", "org.example.other")
    assert refused(bench.render, token).platform_status == Status.CALLER_NOT_ALLOWED
    with bench.database.write() as tx:
        uninstall(tx, OWNER)
    assert refused(bench.render, token).platform_status == Status.NAME_NOT_FOUND


# Events

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


def test_a_surface_opens_for_no_other_certificate(bench):
    token = shown(bench, content=b"1")
    with bench.database.write() as tx:
        install(tx, replace(bench.app, owner=replace(OWNER, certificate_digest="CD" * 32)), NOW)
    assert "another certificate" in refused(bench.render, token).detail


def command_of(child):
    try:
        return Path(f"/proc/{child}/cmdline").read_bytes()
    except OSError:
        return b""


def test_no_more_than_so_many_services_run_at_a_time(bench):
    bench.install("def on_execute(self, request):\n    import time\n    time.sleep(0.3)\n    return ExecuteOutput()\n")

    async def many():
        calls = [bench.operations.execute(OWNER.package, OWNER.class_name, CALLER, {}) for _ in range(6)]
        running = [asyncio.ensure_future(call) for call in calls]
        most = 0
        while not all(one.done() for one in running):
            # The process of the tests has other children too.
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            most = max(most, sum(b"worker_main" in command_of(child) for child in children))
            await asyncio.sleep(0.01)
        return most, [one.result() for one in running]

    most, done = asyncio.run(many())
    assert len(done) == 6
    assert 2 <= most <= 4


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
        assert refused(bench.open, token, bad).platform_status == Status.INTERNAL
    # The same component under another certificate is another service.
    bench.install(LINKS, owner=replace(OWNER, certificate_digest="CD" * 32))
    assert refused(bench.open, token, image).platform_status == Status.INTERNAL
    assert bench.events() == []


# Web triggers


def test_a_web_trigger_leaves_records_of_the_app_that_saw_the_page(bench):
    bench.install(SHOWS)
    bench.web_trigger()
    assert (bench.requests(), bench.events()) == (["org.example.browser"], [(1, 0, 3)])


def test_a_web_trigger_needs_measurement_consent_and_a_caller_on_the_list(bench):
    bench.install(SHOWS)
    bench.flag("caller_app_allow_list", CALLER)
    assert refused(bench.web_trigger).platform_status == Status.CALLER_NOT_ALLOWED
    bench.revoke("measurement")
    assert refused(bench.web_trigger, CALLER).platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.requests() == []


# Downloads


def test_a_download_keeps_what_the_hook_names_and_deletes_the_rest(bench):
    bench.install(
        """
        def on_download_completed(self, request):
            contents = request.downloaded_contents
            print(sorted(contents.key_set()), contents.get("new"), sorted(self.remote.key_set()))
            return DownloadCompletedOutput(["old", "new", "never"])
        """
    )
    bench.remote(old=b"old", gone=b"gone")
    assert bench.download({"new": b"new", "unwanted": b""}) == 2
    assert bench.values("remote_data") == {"old": b"old", "new": b"new"}
    assert bench.entries()[0].output == "['new', 'unwanted'] b'new' ['gone', 'old']\n"
    with bench.database.read() as tx:
        assert tx.execute("SELECT sync_token FROM app").fetchall() == [(3600,)]


def test_a_download_that_nobody_keeps_empties_remote_data_and_the_log_warns(bench):
    bench.install()
    bench.remote(old=b"old")
    assert bench.download({"new": b"new"}) == 0
    assert bench.values("remote_data") == {}
    warning, _ = bench.entries()
    assert (warning.outcome, "empty" in warning.detail) == ("warning", True)


@pytest.mark.parametrize("answer", ["return None", "return DownloadCompletedOutput(None)", "raise KeyError"])
def test_a_download_hook_without_an_answer_leaves_everything_as_it_was(bench, answer):
    bench.install(f"def on_download_completed(self, request): {answer}")
    bench.remote(old=b"old")
    assert refused(bench.download, {"new": b"new"}).platform_status == Status.SERVICE_FAILED
    assert bench.values("remote_data") == {"old": b"old"}
    with bench.database.read() as tx:
        assert tx.execute("SELECT sync_token FROM app").fetchall() == [(None,)]


# Training

TRAINS = """
def on_training_example(self, request):
    print(request.population_name, request.task_name, request.resumption_token, request.collection_name)
    print(sorted(self.user_data.app_infos), self.user_data.battery_percentage, self.local.put("x", b"") or "read-only")
    return TrainingExampleOutput([TrainingExampleRecord(b"one", b"t1"), TrainingExampleRecord(b"two")])
"""


def test_a_scheduled_population_gets_its_service_s_examples_and_even_after_a_cancel(bench):
    bench.install(TRAINS)
    bench.schedule()
    records = bench.examples(resumption_token=b"t0", collection_name="app://clicks")
    assert [(one.training_example, one.resumption_token) for one in records] == [(b"one", b"t1"), (b"two", None)]
    assert bench.entries()[0].output == "digits 3 b't0' app://clicks\n[] 77 read-only\n"
    assert bench.values("local_data") == {}
    with bench.database.write() as tx:
        tasks.cancel(tx, OWNER, "digits")
    assert len(bench.examples()) == 2


def test_a_population_that_was_never_scheduled_gets_no_examples(bench):
    bench.install("def on_training_example(self, request): print('ran')")
    bench.schedule()
    assert refused(bench.examples, "letters").platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.task() is not None
    assert bench.entries()[0].output == ""


def test_without_consent_a_task_is_cancelled_instead_of_asked(bench):
    bench.install("def on_training_example(self, request): print('ran')")
    bench.schedule()
    bench.revoke("measurement")
    assert refused(bench.examples).platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.task() is None
    assert bench.entries()[0].output == ""


def test_a_task_of_an_earlier_certificate_is_cancelled(bench):
    bench.install(TRAINS)
    bench.schedule()
    newer = replace(OWNER, certificate_digest="CD" * 32)
    with bench.database.write() as tx:
        tx.execute("UPDATE app SET owner = ?, certificate_digest = ?", (newer.digest, newer.certificate_digest))
    assert refused(bench.examples).platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.task() is None


def test_a_run_waits_for_examples_no_longer_than_its_flag_says(bench):
    bench.install("def on_training_example(self, request): time.sleep(60)")
    bench.schedule()
    bench.flag("example_store_service_timeout_sec", 1)
    failure = refused(bench.examples)
    assert (failure.platform_status, "within 1 s" in failure.detail) == (Status.SERVICE_TIMEOUT, True)
    assert "in on_training_example" in bench.entries()[0].output


def test_the_apps_of_a_device_are_seen_by_listed_services_and_in_two_hooks_only(bench):
    bench.install(
        TRAINS
        + """
def on_execute(self, request): print(dict(self.user_data.app_infos))
def on_web_trigger(self, request): print(dict(self.user_data.app_infos))
"""
    )
    bench.schedule()
    refused(bench.execute)
    bench.flag("platform_data_for_execute_allowlist", OWNER.package)
    refused(bench.execute)
    refused(bench.web_trigger)
    bench.examples()
    first, execute, trigger, examples = (entry.output.splitlines() for entry in bench.entries())
    assert first[0] == trigger[0] == "{}"
    assert execute[0] == "{'org.example.app': AppInfo(is_installed=True)}"
    assert examples[1].startswith("['org.example.app'] 77")


# Scheduling

SCHEDULES = """
def on_execute(self, request):
    mode = SchedulingMode(request.app_params.get("mode", 1))
    self.later("digits", scheduling_mode=mode, minimum_interval=timedelta(hours=12))
    if request.app_params.get("cancel"):
        self.scheduler.cancel(FederatedComputeInput("digits"))
    return ExecuteOutput()

def on_download_completed(self, request):
    self.later("digits")
    return DownloadCompletedOutput(["new"])

def on_event(self, request): self.later("digits")
def on_render(self, request): self.later("digits")
def on_web_trigger(self, request): self.later("digits")
def on_training_example(self, request): self.scheduler.cancel(FederatedComputeInput("digits"))
"""


@pytest.mark.parametrize(("mode", "recurrent"), [(1, False), (2, True)])
def test_a_service_schedules_and_cancels_in_on_execute(bench, mode, recurrent):
    bench.install(SCHEDULES)
    bench.execute(mode=mode)
    task = bench.task()
    interval = timedelta(hours=12) // timedelta(milliseconds=1)
    assert (task.owner, task.server, task.recurrent, task.minimum_interval) == (OWNER, SERVER, recurrent, interval)
    assert task.earliest_run == NOW + 300_000
    bench.execute(mode=mode, cancel=True)
    assert bench.task() is None


def test_a_service_schedules_when_its_data_has_come(bench):
    bench.install(SCHEDULES)
    bench.download({"new": b""})
    assert bench.task().population == "digits"


def test_elsewhere_there_is_no_scheduler(bench):
    bench.install(SCHEDULES)
    assert refused(bench.web_trigger).platform_status == Status.SERVICE_FAILED
    assert bench.task() is None
    bench.schedule()
    assert refused(bench.examples).platform_status == Status.SERVICE_FAILED
    assert bench.task() is not None
    assert all("IllegalState" in entry.detail for entry in bench.entries())


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (lambda bench: bench.install(PROMISES, server=None), 7, "names no server"),
        (lambda bench: bench.install(PROMISES, server="no url"), 7, "names no server"),
        (lambda bench: bench.install(PROMISES, server="http://["), 7, "names no server"),
        (lambda bench: bench.revoke("measurement"), 6, "consent is revoked"),
        (lambda bench: bench.flag("federated_compute_kill_switch", "true"), 6, "federated_compute_kill_switch is on"),
        (lambda bench: bench.flag("task_limit_per_package", 0), 6, "the limit is 0"),
    ],
)
def test_a_refused_schedule_is_told_to_those_who_wait_for_it_and_stands_in_the_log(bench, change, code, reason):
    bench.install(PROMISES)
    change(bench)
    bench.flag("output_data_allow_list", "*")
    told = bench.execute(maximum=9).best_value
    refusal, again, execute = bench.entries()
    assert (refusal.owner, refusal.subject, refusal.outcome) == (OWNER.digest, "digits", "not_scheduled")
    assert reason in refusal.detail
    assert (again.detail, execute.outcome) == (refusal.detail, "ok")
    assert told == code
    assert bench.task() is None


PROMISES = """
async def on_execute(self, request):
    params = Params(TrainingInterval())
    self.scheduler.schedule(params, FederatedComputeInput("digits"))
    try:
        await self.scheduler.schedule_request(FederatedComputeScheduleRequest(params, "digits"))
    except OnDevicePersonalizationException as error:
        return ExecuteOutput(best_value=error.code)
"""


def test_the_server_set_for_tests_is_that_of_its_package_only(bench):
    bench.install(PROMISES)
    bench.flag("override_fc_server_url", "http://localhost:8080")
    bench.flag("override_fc_server_url_package", "org.example.other")
    bench.schedule()
    assert bench.task().server == SERVER
    bench.flag("override_fc_server_url_package", OWNER.package)
    bench.schedule()
    assert bench.task().server == "http://localhost:8080"


def test_a_removed_app_schedules_nothing(bench):
    bench.install()
    with bench.database.write() as tx:
        uninstall(tx, OWNER)
    with pytest.raises(NotAnswered, match="removed"):
        bench.schedule()
    assert bench.task() is None


def test_a_record_read_back_belongs_to_the_service_that_wrote_it(bench):
    """What one certificate has stored, the next one does not see."""
    reads = """
def on_execute(self, request):
    print(len(self.logs.get_requests(*EVER)), sorted(self.local.key_set()), sorted(self.remote.key_set()))
    self.local.put("mine", b"")
    return ExecuteOutput(RequestLogRecord([{}]))
"""
    bench.install(reads)
    bench.remote(given=b"")
    bench.execute()
    bench.execute()
    assert [entry.output for entry in bench.entries()] == ["0 [] ['given']\n", "1 ['mine'] ['given']\n"]
    bench.install(reads, owner=replace(OWNER, certificate_digest="CD" * 32))
    bench.execute()
    assert bench.entries()[-1].output == "0 [] []\n"
    with bench.database.read() as tx:
        assert len(log_records.read_requests(tx, bench.app.owner, *EVER)) == 1
