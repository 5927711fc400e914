import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.settings import RetryWindow, Settings


def test_defaults_need_a_directory_only_and_speak_of_localhost(tmp_path):
    settings = Settings(data_dir=tmp_path)
    assert settings.base_url == "http://localhost:8080"
    assert settings.database == f"sqlite:///{tmp_path}/fedcompute.db"
    assert settings.blobs == f"file://{tmp_path}/blobs"
    assert settings.worker_count >= 1


def test_another_database_changes_no_other_setting(tmp_path):
    def told(settings):
        names = [name for name in dir(settings) if not name.startswith("_")]
        return {name: value for name in names if not callable(value := getattr(settings, name))}

    usual = told(Settings(data_dir=tmp_path))
    other = told(Settings(data_dir=tmp_path, database_url="postgresql://user@host/name"))
    assert {name for name in usual if usual[name] != other[name]} == {"database_url", "database"}


@pytest.mark.parametrize(
    "changes",
    [
        {"public_url": "http://127.0.0.1:8080"},
        {"public_url": "http://example.com"},
        {"retry_no_task": RetryWindow(0, 1)},
        {"retry_no_task": RetryWindow(2, 1)},
        {"retry_no_active_task": RetryWindow(1, 1_000_000)},
        {"signed_url_life": 0},
        {"collector_batch_size": 0},
        {"workers": -1},
        {"keep_updates_days": -1.0},
        {"keep_checkpoints_days": float("nan")},
        {"keep_assignments_days": 1e9},
        {"keep_newest_checkpoints": 0},
        {"retention_period": -1.0},
        {"evaluation_lookback_hours": -1.0},
        {"blob_urls": "theirs"},
    ],
)
def test_a_setting_that_devices_would_refuse_is_refused_at_start(tmp_path, changes):
    with pytest.raises(OperationFailed) as caught:
        Settings(data_dir=tmp_path, **changes)
    assert caught.value.reason is Reason.SETTINGS_INVALID
    assert next(iter(changes)) in caught.value.detail
