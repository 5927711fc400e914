"""`fedcompute backup`, `restore`, `doctor` and `retention` beside a server that runs, and without one."""

import json
import shutil
import stat
import time

import httpx
import pytest

from fedcompute.protos import task_pb2
from fedcompute.storage.database import Database


@pytest.fixture
def data(tmp_path, start):
    """A server's data directory and its URL; the server runs."""
    folder = tmp_path / "data"
    process = start("fedcompute", "server", "--data-dir", folder, "--port", "0", "--json", "--workers", "1")
    return folder, json.loads(process.stdout.readline())["url"]


def test_a_backup_is_checked_and_restored_and_the_secret_travels_only_when_asked(data, fedcompute, tmp_path):
    folder, _ = data
    plain = fedcompute("backup", tmp_path / "plain", "--data-dir", folder)
    assert plain.exit_code == 0, plain.output
    assert "is not in it: keep a copy elsewhere" in plain.output
    assert not (tmp_path / "plain" / "secret").exists()
    secret = (folder / "secret").read_text().strip()
    whole = fedcompute("backup", tmp_path / "whole", "--data-dir", folder, "--with-secret", "--json")
    assert whole.exit_code == 0, whole.output
    assert json.loads(whole.output)["with_secret"] is True
    assert secret not in whole.output
    assert stat.S_IMODE((tmp_path / "whole" / "secret").stat().st_mode) == 0o600

    checked = fedcompute("restore", tmp_path / "whole", "--check")
    assert (checked.exit_code, "is whole" in checked.output) == (0, True)
    done = fedcompute("restore", tmp_path / "whole", "--data-dir", tmp_path / "other")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "other" / "secret").read_text().strip() == secret
    assert fedcompute("secret", "check", "--data-dir", tmp_path / "other").exit_code == 0
    assert fedcompute("doctor", "--data-dir", tmp_path / "other").exit_code == 0
    again = fedcompute("restore", tmp_path / "whole", "--data-dir", tmp_path / "other")
    assert (again.exit_code, "backup_target_in_use" in again.output) == (1, True)


def test_nothing_is_restored_under_a_server_that_runs(data, fedcompute, tmp_path):
    folder, _ = data
    assert fedcompute("backup", tmp_path / "backup", "--data-dir", folder).exit_code == 0
    result = fedcompute("restore", tmp_path / "backup", "--data-dir", folder)
    assert (result.exit_code, "data_in_use" in result.output) == (1, True)


def test_a_backup_whose_manifest_is_missing_is_no_backup(data, fedcompute, tmp_path):
    folder, _ = data
    fedcompute("backup", tmp_path / "backup", "--data-dir", folder)
    (tmp_path / "backup" / "manifest.json").unlink()
    result = fedcompute("restore", tmp_path / "backup", "--check")
    assert (result.exit_code, "backup_damaged" in result.output) == (1, True)


def test_a_healthy_server_gets_a_clean_bill_by_its_stores_and_over_http(data, fedcompute):
    folder, url = data
    for where in (["--data-dir", folder], ["--server", url]):
        result = fedcompute("doctor", *where)
        assert (result.exit_code, "nothing is stuck" in result.output) == (0, True), result.output
        told = fedcompute("doctor", *where, "--json")
        assert json.loads(told.output) == {"healthy": True, "findings": []}


def test_what_is_wrong_is_named_with_what_to_do_and_mended_when_asked(data, fedcompute):
    folder, _ = data
    (folder / "secret").chmod(0o640)
    orphan = folder / "blobs" / "gradient" / "digits" / "1" / "1" / "d" / "nobody" / "gradient"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"x")
    result = fedcompute("doctor", "--data-dir", folder, "--json")
    assert result.exit_code == 1
    findings = {one["code"]: one for one in json.loads(result.output)["findings"]}
    assert findings.keys() == {"secret_readable", "upload_without_row"}
    assert all(one["fixable"] and not one["fixed"] and one["remedy"] for one in findings.values())
    assert "2 findings, 2 fixed" in fedcompute("doctor", "--data-dir", folder, "--fix").output
    assert not orphan.exists()
    assert fedcompute("doctor", "--data-dir", folder).exit_code == 0


def test_a_server_that_does_not_answer_or_is_not_there_is_a_finding(fedcompute, tmp_path):
    result = fedcompute("doctor", "--server", "http://localhost:9", "--json")
    assert (result.exit_code, json.loads(result.output)["findings"][0]["code"]) == (1, "server_unreachable")
    result = fedcompute("doctor", "--data-dir", tmp_path / "nobody", "--json")
    assert (result.exit_code, json.loads(result.output)["findings"][0]["code"]) == (1, "stores_unusable")
    assert not (tmp_path / "nobody").exists()
    Database.open(f"sqlite:///{tmp_path}/fedcompute.db").close()
    result = fedcompute("doctor", "--data-dir", tmp_path)
    assert (result.exit_code, "there is no blob store in 'blobs'" in result.output) == (1, True)
    assert not (tmp_path / "blobs").exists()


def test_a_database_of_another_release_is_a_finding_and_is_not_upgraded(fedcompute, tmp_path):
    database = Database.open(f"sqlite:///{tmp_path}/fedcompute.db")
    (tmp_path / "blobs").mkdir()
    with database.write() as tx:
        tx.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    result = fedcompute("doctor", "--data-dir", tmp_path)
    assert (result.exit_code, "has schema 0001" in result.output) == (1, True)
    with database.read() as tx:
        assert tx.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == "0001"
    database.close()


def test_retention_says_what_is_due_and_removes_it(data, fedcompute):
    folder, _ = data
    result = fedcompute("retention", "run", "--dry-run", "--data-dir", folder)
    assert (result.exit_code, "due: 0 checkpoints" in result.output) == (0, True), result.output
    result = fedcompute("retention", "run", "--data-dir", folder, "--keep-updates-days", "0", "--json")
    assert json.loads(result.output) == {
        "rounds": [], "checkpoints": [], "tasks": [], "objects": 0, "rows": 0, "finished": True, "dry_run": False,
    }  # fmt: skip


def test_over_http_a_failed_task_and_a_server_that_is_not_ready_are_found(data, fedcompute):
    folder, url = data
    task = task_pb2.Task(
        total_iteration=1, min_aggregation_size=1, max_aggregation_size=1, min_client_version="0",
        max_client_version="9",
    )  # fmt: skip
    created = httpx.post(
        f"{url}/taskmanagement/v1/population/broken:create-task",
        content=task_pb2.CreateTaskRequest(task=task).SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )
    task = task_pb2.CreateTaskResponse.FromString(created.content).task
    for place in (*task.init_checkpoint_url, *task.server_phase_url, *task.client_only_plan_url):
        assert httpx.put(place, content=b"\x0ajunk").status_code == 200

    def codes():
        result = fedcompute("doctor", "--server", url, "--json")
        return {one["code"]: one for one in json.loads(result.output)["findings"]}

    deadline = time.monotonic() + 60
    while not (found := codes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found["task_failed"]["subject"] == "broken/1"
    assert "plan_malformed" in found["task_failed"]["what"]

    shutil.rmtree(folder / "blobs")
    (folder / "blobs").write_text("no directory any more")
    while not (found := codes()).keys() & {"server_not_ready"} and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found["server_not_ready"]["what"].startswith("blobs: ")


@pytest.mark.parametrize(
    "command",
    [
        ("api-key", "list"),
        ("api-key", "revoke", "0f1e2d3c4b5a"),
        ("audit", "log"),
        ("enrolment", "list"),
        ("enrolment", "revoke", "0f1e2d3c4b5a6978"),
        ("secret", "check"),
        ("secret", "rotate"),
    ],
)
def test_a_wrong_data_directory_gets_no_database_of_its_own(fedcompute, tmp_path, command):
    result = fedcompute(*command, "--data-dir", tmp_path / "wrong")
    assert result.exit_code == 1
    assert "there is no database fedcompute.db in 'wrong'" in result.output
    assert not (tmp_path / "wrong").exists()


def test_a_damaged_database_file_is_not_blamed_on_space_or_rights(fedcompute, tmp_path):
    (tmp_path / "fedcompute.db").write_bytes(b"no database " * 1000)
    result = fedcompute("api-key", "list", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert "restore a backup" in result.output
