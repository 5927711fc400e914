"""Hooks of real apps in real confined processes: every operation, every facility, and where the class is found."""

import asyncio
from datetime import UTC, datetime

import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.log_records import EventLogRecord, RequestLogRecord
from fedcompute.device.developer.worker import (
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
    TrainingExampleRecord,
    WebTriggerInput,
    WebTriggerOutput,
)
from fedcompute.device.state import key_values, log_records

MEBIBYTE = 1 << 20


# What a worker does that is as it should be


def test_execute_gets_its_parameters_and_everything_that_it_answers_arrives(device):
    called = device.call(
        """
        print("hello")
        record = RequestLogRecord([{"n": 1, "ok": True, "x": 0.5, "s": "é", "b": b"\\xff", "none": None}])
        return ExecuteOutput(
            record, RenderingConfig(["k"]), [EventLogRecord(0, 5, {"a": request.app_params["n"]})], b"data", 3
        )
        """,
        request=ExecuteInput("com.example.caller", {"n": 41}),
    )
    assert called.printed == "hello\n"
    record = RequestLogRecord([{"n": 1, "ok": True, "x": 0.5, "s": "é", "b": b"\xff", "none": None}])
    events = [EventLogRecord(0, 5, {"a": 41})]
    assert device.answer(called) == device.plain(ExecuteOutput(record, RenderingConfig(["k"]), events, b"data", 3))


def test_a_download_is_seen_before_it_is_remote_data(device):
    with device.database.write() as tx:
        key_values.put_value(tx, "remote_data", device.owner, "old", b"1")
    called = device.call(
        """
        new, old = request.downloaded_contents, self.service.get_remote_data(self.token)
        assert (new.get("new"), new.get("old"), old.get("new"), old.get("old")) == (b"2", None, None, b"1")
        return DownloadCompletedOutput(sorted(new.key_set() | old.key_set()))
        """,
        "download_completed",
        downloaded={"new": b"2"},
    )
    assert device.answer(called) == device.plain(DownloadCompletedOutput(["new", "old"]))


def test_render_gets_its_room_and_its_keys(device):
    called = device.call(
        "return RenderOutput(content=f'{request.width}x{request.height} {request.rendering_config.keys}')",
        "render",
        RenderInput(300, 200, RenderingConfig(["a"])),
    )
    assert device.answer(called) == device.plain(RenderOutput(content="300x200 ['a']"))


def test_an_event_gets_the_record_of_its_request(device):
    record = RequestLogRecord([{"shown": 1}, {}], datetime(2026, 1, 2, tzinfo=UTC), 12)
    called = device.call(
        "return EventOutput(EventLogRecord(1, 2, dict(request.parameters), request.request_log_record))",
        "event",
        EventInput(record, {"clicked": True}),
    )
    assert device.answer(called) == device.plain(EventOutput(EventLogRecord(1, 2, {"clicked": True}, record)))


@pytest.mark.parametrize("hook", ["on_training_examples", "on_training_example"])
def test_training_examples_come_with_their_tokens(device, hook):
    device.write(
        """
        example = training_example({"x": [1.0, 2.0]})
        token = request.resumption_token + b"+" + request.task_name.encode()
        return TrainingExampleOutput([TrainingExampleRecord(example, token), TrainingExampleRecord(example)])
        """,
        "training_examples",
    )
    source = device.code / "sample_service.py"
    source.write_text(source.read_text().replace("on_training_examples", hook))
    request = TrainingExampleInput("population", "7", b"3")
    called = asyncio.run(device.calling("training_examples", request))
    first, second = called.result.training_example_records
    assert first.resumption_token == b"3+7"
    assert second == TrainingExampleRecord(first.training_example)


def test_a_web_trigger_gets_its_data(device):
    called = device.call(
        "return WebTriggerOutput(RequestLogRecord([{'data': request.data}]))",
        "web_trigger",
        WebTriggerInput("https://example.com", "com.example.browser", b"\x00\xff"),
    )
    assert device.answer(called) == device.plain(WebTriggerOutput(RequestLogRecord([{"data": b"\x00\xff"}])))


def test_a_hook_may_be_a_coroutine(device):
    called = device.call(
        """
        await asyncio.gather(*(asyncio.to_thread(self.local.put, str(n), b"v") for n in range(20)))
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        return ExecuteOutput(best_value=len(self.local.key_set()))
        """,
        kind="async def",
    )
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=20))


def test_hooks_that_are_not_overridden_answer_with_nothing(device):
    device.write("return ExecuteOutput()")
    trigger = asyncio.run(device.calling("web_trigger", WebTriggerInput("u", "p")))
    assert device.answer(trigger) == device.plain(WebTriggerOutput())
    assert device.answer(asyncio.run(device.calling("download_completed"))) == device.plain(DownloadCompletedOutput())
    examples = asyncio.run(device.calling("training_examples", TrainingExampleInput("p", "1")))
    assert device.answer(examples) == device.plain(TrainingExampleOutput())


def test_all_facilities_of_an_operation_answer(device):
    with device.database.write() as tx:
        key_values.put_value(tx, "remote_data", device.owner, "r", b"remote")
        record = RequestLogRecord([{"a": 1}])
        events = [EventLogRecord(0, 9, {"b": 2})]
        log_records.write_records(tx, device.owner, "com.example.caller", record, events, 1_700_000_000_123)
    called = device.call(
        """
        assert self.service.get_remote_data(self.token).get("r") == b"remote"
        assert (self.local.put("k", b"1"), self.local.put("k", b"2"), self.local.get("k")) == (None, b"1", b"2")
        assert (self.local.remove("k"), self.local.remove("k"), self.local.key_set()) == (b"2", None, set())
        logs = self.service.get_log_reader(self.token)
        written = datetime.fromtimestamp(1_700_000_000.123, UTC)
        (record,) = logs.get_requests(written - timedelta(milliseconds=1), written + timedelta(milliseconds=1))
        assert (record.rows, record.time, record.id) == ([{"a": 1}], written, 1), record
        (event,) = logs.get_joined_events(written - timedelta(days=1), written + timedelta(days=1))
        assert (event.row_index, event.type, event.data, event.request_log_record) == (0, 9, {"b": 2}, record)
        assert self.service.get_user_data(self.token).battery_percentage == 55
        scheduler = self.service.get_federated_compute_scheduler(self.token)
        params = Params(TrainingInterval(SchedulingMode.RECURRENT, timedelta(minutes=5)))
        scheduler.schedule(params, FederatedComputeInput("first"))
        scheduler.cancel(FederatedComputeInput("second"))
        scheduler.schedule(params, FederatedComputeInput("refused"))
        granted = await scheduler.schedule_request(FederatedComputeScheduleRequest(params, "third"))
        assert granted.request.population_name == "third"
        try:
            await scheduler.schedule_request(FederatedComputeScheduleRequest(params, "refused"))
        except OnDevicePersonalizationException as refused:
            assert refused.code is ErrorCode.INVALID_TRAINING_MANIFEST
        else:
            raise AssertionError
        urls = self.service.get_event_url_provider(self.token)
        assert urls.create_event_tracking_url_with_response({"n": 1}).startswith("odp://localhost")
        return ExecuteOutput(best_value=1)
        """,
        kind="async def",
    )
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=1))
    assert called.printed == ("not scheduled: the manifest names no server [federated_compute_manifest_invalid]\n")
    assert device.scheduled == [("first", True, 300_000), "second", ("third", True, 300_000)]


def test_plain_values_of_numpy_travel_as_what_they_stand_for(device):
    called = device.call(
        """
        import numpy as np
        x = np.arange(4.0)
        record = RequestLogRecord([{"mean": x.mean(), "name": np.str_("n")}])
        return ExecuteOutput(record, best_value=np.int64(3))
        """
    )
    assert device.answer(called) == device.plain(
        ExecuteOutput(RequestLogRecord([{"mean": 1.5, "name": "n"}]), best_value=3)
    )


def test_values_of_many_megabytes_come_and_go(device):
    called = device.call(
        """
        value = os.urandom(30 << 20)
        self.local.put("k", value)
        assert self.local.get("k") == value
        return TrainingExampleOutput([TrainingExampleRecord(value[:20 << 20]), TrainingExampleRecord(value[20 << 20:])])
        """,
        "training_examples",
        TrainingExampleInput("p", "1"),
    )
    # Training may only read what is stored.
    assert "AssertionError" in called.printed
    device.call("self.local.put('k', bytes(30 << 20)); return ExecuteOutput()")
    called = device.call(
        """
        value = self.local.get("k")
        return TrainingExampleOutput([TrainingExampleRecord(value[:20 << 20]), TrainingExampleRecord(value[20 << 20:])])
        """,
        "training_examples",
        TrainingExampleInput("p", "1"),
    )
    sizes = [len(one.training_example) for one in called.result.training_example_records]
    assert sizes == [20 * MEBIBYTE, 10 * MEBIBYTE]


def test_calls_at_the_same_time_get_their_own_answers(device):
    device.write(
        """
        self.local.put(str(request.app_params["n"]), b"v")
        return ExecuteOutput(best_value=request.app_params["n"])
        """
    )

    async def together():
        return await asyncio.gather(*(device.calling(request=ExecuteInput("a", {"n": n})) for n in range(6)))

    assert [called.result.best_value for called in asyncio.run(together())] == list(range(6))
    with device.database.read() as tx:
        assert key_values.key_set(tx, "local_data", device.owner) == list("012345")


def test_a_thread_that_still_asks_does_not_disturb_the_answer(device):
    called = device.call(
        """
        def ask():
            while True:
                self.local.put("k", b"v")

        for _ in range(4):
            threading.Thread(target=ask, daemon=True).start()
        time.sleep(0.1)
        return ExecuteOutput(best_value=1)
        """
    )
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=1))


# Where the class is found


@pytest.mark.parametrize(
    ("files", "class_name"),
    [
        (["com/__init__.py", "com/example/__init__.py", "com/example/app.py"], "com.example.app.SampleService"),
        (["com/example/app.py"], "com.example.app.SampleService"),
        (["sample_service.py"], "com.example.app.SampleService"),
        (["sample_service.py"], "io.example.SampleService"),
        (["sample_service/__init__.py"], "com.example.app.SampleService"),
        (["sample_service.py"], "SampleService"),
        (["my_module.py"], "my_module.SampleService"),
    ],
    ids=[
        "package",
        "package without __init__",
        "module by class",
        "package named as a library",
        "folder",
        "no package",
        "module",
    ],
)
def test_the_class_of_the_manifest_is_found(device, files, class_name):
    device.write("return ExecuteOutput(best_value=4)")
    source = (device.code / "sample_service.py").read_text()
    (device.code / "sample_service.py").unlink()
    for name in files:
        path = device.code / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    path.write_text(source)
    called = asyncio.run(device.calling(class_name=class_name))
    assert device.answer(called) == device.plain(ExecuteOutput(best_value=4))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import absent_library", "No module named 'absent_library'"),
        ("def", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("SampleService = 4", "module sample_service has no IsolatedService named SampleService"),
        ("class SampleService: pass", "module sample_service has no IsolatedService named SampleService"),
        ("", "module sample_service has no IsolatedService named SampleService"),
        (
            "from fedcompute.device import IsolatedService\nclass SampleService(IsolatedService): pass",
            "Can't instantiate abstract class SampleService",
        ),
        (None, "No module named 'sample_service'"),
    ],
)
def test_what_cannot_be_loaded_says_why(device, source, said):
    if source is not None:
        (device.code / "sample_service.py").write_text(source)
    called = asyncio.run(device.calling())
    assert device.failure(called)[0] is Status.LOADING_FAILED
    assert said in called.printed


def test_an_app_whose_folder_is_gone_cannot_be_loaded(device):
    device.code.rmdir()
    called = asyncio.run(device.calling())
    assert device.failure(called) == (Status.LOADING_FAILED, "on_execute: the process ended with 1")
    assert "which the policy grants, is not there" in called.printed
