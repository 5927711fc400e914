"""The flags of a device: Android's names and defaults, checked when they are set."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedcompute.device
from fedcompute.device.jobs.flags import FLAGS, Flags, delete_flag, flags, list_flags, put_flag
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.errors import OperationFailed, Reason

# Spec 6.8 and 8.4; what a fresh Android device would have and a fresh device of ours has too.
ANDROID = {
    "enable_background_encryption_key_fetch": True,
    "fcp_enable_encryption": True,
    "http_request_retry_limit": 3,
    "default_scheduling_period_secs": 300,
    "min_scheduling_interval_secs_for_federated_computation": 60,
    "max_scheduling_interval_secs_for_federated_computation": 518_400,
    "max_scheduling_period_secs": 172_800,
    "transient_error_retry_delay_secs": 900,
    "transient_error_retry_delay_jitter_percent": 0.2,
    "tf_error_reschedule_seconds": 86_400,
    "reschedule_limit": 6,
    "recurrent_reschedule_limit": 100,
    "task_limit_per_package": 50,
    "training_min_battery_level": 30,
    "training_thermal_to_throttle": 2,
    "training_condition_check_period_throttle_period_mills": 1000,
    "memory_size_limit": 50_000_000,
    "checkpoint_file_size_limit": 50_000_000,
    "enable_eligibility_task": True,
    "task_history_ttl_millis": 604_800_000,
    "example_store_service_timeout_sec": 10,
    "example_iterator_next_timeout_sec": 2,
    "enable_personalization_status_override": False,
    "personalization_status_override_value": False,
    "isolated_service_deadline_seconds": 30,
    "reset_data_delay_seconds": 86_400,
    "reset_data_deadline_seconds": 108_000,
    "noise_for_execute_best_value": 0.1,
    "max_int_values_limit": 100,
    "output_data_allow_list": "",
    "platform_data_for_execute_allowlist": "",
}
# Where ours starts with something that works.
DIFFERENT = {
    "federated_compute_kill_switch": False,
    "global_kill_switch": False,
    "fcp_encryption_key_download_url": "",
    "caller_app_allow_list": "*",
    "isolated_service_allow_list": "*",
}


@pytest.fixture
def database():
    made = DeviceDatabase()
    yield made
    made.close()


def test_defaults_are_androids_but_for_those_that_keep_it_from_working():
    expected = ANDROID | DIFFERENT
    assert {name: FLAGS[name].default for name in expected} == expected


def test_every_flag_reads_its_own_default_and_says_what_it_does():
    for flag in FLAGS.values():
        value = flag.read(flag.show(flag.default))
        assert (value, type(value)) == (flag.default, type(flag.default))
        assert flag.help


def test_a_flag_is_seen_from_when_it_is_set_until_it_is_deleted(database):
    with database.write() as tx:
        before = flags(tx)
        put_flag(tx, "reschedule_limit", " 2 ")
        put_flag(tx, "fcp_enable_encryption", "FALSE")
        put_flag(tx, "transient_error_retry_delay_jitter_percent", "0.5")
        put_flag(tx, "override_fc_server_url", "https://learn.example/a=b,c")
    with database.read() as tx:
        after = flags(tx)
    assert after.integer("reschedule_limit") == 2
    assert after.boolean("fcp_enable_encryption") is False
    assert after.number("transient_error_retry_delay_jitter_percent") == 0.5
    assert after.text("override_fc_server_url") == "https://learn.example/a=b,c"
    assert before == Flags()
    with database.write() as tx:
        assert delete_flag(tx, "reschedule_limit")
        assert not delete_flag(tx, "reschedule_limit")
        assert flags(tx).integer("reschedule_limit") == 6
        states = {state.flag.name: state for state in list_flags(tx)}
    assert list(states) == list(FLAGS)
    assert {name for name, state in states.items() if state.is_set} == set(after.changed) - {"reschedule_limit"}
    assert states["fcp_enable_encryption"].value is False


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("reschedule_limit", "six", "is no integer"),
        ("reschedule_limit", "-1", "is below 0"),
        ("reschedule_limit", "1" * 5000, "is no integer"),
        ("http_request_retry_limit", "0", "is below 1"),
        ("training_min_battery_level", "101", "is above 100"),
        ("fcp_enable_encryption", "maybe", "is no boolean"),
        ("noise_for_execute_best_value", "nan", "is no number"),
        ("noise_for_execute_best_value", "1.1", "is above 1"),
        ("condition_idle", "yes", "is none of auto, true, false"),
        ("condition_battery_percent", "101", "is none of"),
        ("fcp_encryption_key_download_url", "https://a\nb", "is no line"),
        ("caller_app_allow_list", "x" * 10_001, "is no line"),
    ],
)
def test_a_value_that_is_none_is_refused_and_changes_nothing(database, name, text, why):
    with database.write() as tx, pytest.raises(OperationFailed, match=why) as refused:
        put_flag(tx, name, text)
    assert refused.value.reason == Reason.SETTINGS_INVALID
    with database.read() as tx:
        assert flags(tx) == Flags()


def test_a_misspelt_flag_is_told_what_was_meant(database):
    for act in (lambda tx: put_flag(tx, "reshedule_limit", "1"), lambda tx: delete_flag(tx, "reshedule_limit")):
        with database.write() as tx, pytest.raises(OperationFailed) as refused:
            act(tx)
        assert refused.value.remedy == "did you mean reschedule_limit?"
    with database.write() as tx, pytest.raises(OperationFailed, match="no flag 'qqqq'"):
        put_flag(tx, "qqqq", "1")


def test_a_flag_of_another_release_is_left_alone(database):
    with database.write() as tx:
        tx.execute("INSERT INTO setting VALUES ('flag.of_tomorrow', x'00'), ('flagship', x'00')")
        assert flags(tx) == Flags()


def test_code_asks_for_flags_that_exist_by_their_type():
    asked = set()
    for file in Path(fedcompute.device.__file__).parents[1].rglob("*.py"):
        asked |= set(re.findall(r"\.(boolean|integer|number|text)\(\s*\"(\w+)\"\s*\)", file.read_text()))
    assert len(asked) > 30
    assert {(kind, name) for kind, name in asked if FLAGS[name].kind != kind} == set()
    with pytest.raises(TypeError, match="reschedule_limit is of the type integer"):
        Flags().text("reschedule_limit")


@given(st.sampled_from(list(FLAGS.values())), st.text())
def test_what_can_be_set_comes_back_as_it_was(flag, text):
    try:
        value = flag.read(text)
    except OperationFailed as refused:
        assert refused.reason == Reason.SETTINGS_INVALID
    else:
        assert type(value) is type(flag.default)
        assert flag.read(flag.show(value)) == value
