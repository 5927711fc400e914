"""What the user allows, and the wipe that follows when it is withdrawn."""

import pytest

from fedcompute.device.jobs.background import earliest_runs
from fedcompute.device.jobs.flags import put_flag
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.settings import Consent, consent, revocations, set_consent

DAY = 86_400_000


@pytest.fixture
def tx():
    database = DeviceDatabase()
    with database.write() as transaction:
        yield transaction
    database.close()


def test_consent_is_given_until_it_is_revoked(tx):
    assert consent(tx) == Consent(measurement=True, protected_audience=True)
    set_consent(tx, "measurement", False, 1000)
    assert consent(tx) == Consent(measurement=False, protected_audience=True)
    assert revocations(tx) == {"measurement": 1000}
    set_consent(tx, "measurement", True, 2000)
    assert consent(tx) == Consent()


def test_the_wipe_comes_a_day_after_the_first_revocation(tx):
    set_consent(tx, "protected_audience", False, 1000)
    set_consent(tx, "measurement", False, 5000)
    set_consent(tx, "protected_audience", False, 9000)
    assert earliest_runs(tx) == [("reset_data", 1000 + DAY)]
    assert revocations(tx) == {"protected_audience": 1000, "measurement": 5000}


def test_the_wipe_is_called_off_when_both_consents_are_given_again(tx):
    for name in ("measurement", "protected_audience"):
        set_consent(tx, name, False, 1000)
    set_consent(tx, "measurement", True, 2000)
    assert earliest_runs(tx) == [("reset_data", 1000 + DAY)]
    set_consent(tx, "protected_audience", True, 2000)
    assert earliest_runs(tx) == []


def test_flags_for_tests_override_both_consents_and_wipe_nothing(tx):
    put_flag(tx, "enable_personalization_status_override", "true")
    assert consent(tx) == Consent(measurement=False, protected_audience=False)
    assert earliest_runs(tx) == []
    put_flag(tx, "personalization_status_override_value", "true")
    set_consent(tx, "measurement", False, 1000)
    assert consent(tx) == Consent()
