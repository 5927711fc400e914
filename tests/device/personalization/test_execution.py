"""What an app gets when a service executes, and what of its answer the device keeps."""

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.owner import Owner
from fedcompute.device.state import log_records
from fedcompute.device.state.apps import install, uninstall

NOW = 1_700_000_000_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
CALLER = "org.example.caller"
EVER = (0, 1 << 50)


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

    assert bench.refused(while_it_runs, bench, remove).platform_status == Status.NAME_NOT_FOUND
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
    assert bench.refused(bench.execute).platform_status == status
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
    failure = bench.refused(bench.execute)
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
    failure = bench.refused(bench.execute)
    assert (failure.platform_status, "'gone'" in failure.detail) == (Status.SERVICE_FAILED, True)
    assert bench.requests() == []
    assert [entry.outcome for entry in bench.entries()] == ["service_failed"]


def test_a_failing_hook_leaves_one_entry_with_its_traceback_and_counts_its_code(bench):
    bench.install("def on_execute(self, request): raise IsolatedServiceException(7, 'of user 12345')")
    failure = bench.refused(bench.execute)
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
    assert bench.refused(bench.execute).platform_status == Status.SERVICE_TIMEOUT
    assert time.monotonic() - start < 10
    (entry,) = bench.entries()
    assert (entry.outcome, "in on_execute" in entry.output) == ("service_timeout", True)


def test_code_that_cannot_be_loaded_is_told_apart(bench):
    bench.install()
    (bench.folder / "app" / "service.py").write_text("import nothing_of_that_name")
    assert bench.refused(bench.execute).platform_status == Status.LOADING_FAILED
    assert "nothing_of_that_name" in bench.entries()[0].output


def test_a_service_whose_folder_is_gone_is_told_apart(bench):
    bench.install()
    with bench.database.write() as tx:
        install(tx, replace(bench.app, code=bench.folder / "gone"), NOW)
    failure = bench.refused(bench.execute)
    assert (failure.platform_status, str(bench.folder / "gone") in failure.detail) == (Status.LOADING_FAILED, True)


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
