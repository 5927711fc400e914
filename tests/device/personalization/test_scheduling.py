"""The tasks that services schedule."""

from datetime import timedelta

import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.facilities import NotAnswered
from fedcompute.device.owner import Owner
from fedcompute.device.state.apps import uninstall

NOW = 1_700_000_000_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
SERVER = "https://learn.example"


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
    assert bench.refused(bench.web_trigger).platform_status == Status.SERVICE_FAILED
    assert bench.task() is None
    bench.schedule()
    assert bench.refused(bench.examples).platform_status == Status.SERVICE_FAILED
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
