"""The examples that a service gives its tasks."""

from dataclasses import replace

from fedcompute.device.developer.errors import Status
from fedcompute.device.owner import Owner
from fedcompute.device.state import tasks

OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)


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
    assert bench.refused(bench.examples, "letters").platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.task() is not None
    assert bench.entries()[0].output == ""


def test_without_consent_a_task_is_cancelled_instead_of_asked(bench):
    bench.install("def on_training_example(self, request): print('ran')")
    bench.schedule()
    bench.revoke("measurement")
    assert bench.refused(bench.examples).platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.task() is None
    assert bench.entries()[0].output == ""


def test_a_task_of_an_earlier_certificate_is_cancelled(bench):
    bench.install(TRAINS)
    bench.schedule()
    newer = replace(OWNER, certificate_digest="CD" * 32)
    with bench.database.write() as tx:
        tx.execute("UPDATE app SET owner = ?, certificate_digest = ?", (newer.digest, newer.certificate_digest))
    assert bench.refused(bench.examples).platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.task() is None


def test_a_run_waits_for_examples_no_longer_than_its_flag_says(bench):
    bench.install("def on_training_example(self, request): time.sleep(60)")
    bench.schedule()
    bench.flag("example_store_service_timeout_sec", 1)
    failure = bench.refused(bench.examples)
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
    bench.refused(bench.execute)
    bench.flag("platform_data_for_execute_allowlist", OWNER.package)
    bench.refused(bench.execute)
    bench.refused(bench.web_trigger)
    bench.examples()
    first, execute, trigger, examples = (entry.output.splitlines() for entry in bench.entries())
    assert first[0] == trigger[0] == "{}"
    assert execute[0] == "{'org.example.app': AppInfo(is_installed=True)}"
    assert examples[1].startswith("['org.example.app'] 77")
