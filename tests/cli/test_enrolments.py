"""`fedcompute enrolment`, on a database that no server has open, and `fleet run --enrolments`."""

import json
import stat

import pytest
from sqlalchemy import select

from fedcompute.device.client.authorization import read_enrolments
from fedcompute.server.security.operator_secret import open_sealer
from fedcompute.server.settings import Settings
from fedcompute.storage import schema
from fedcompute.storage.database import Database
from fedcompute.storage.enrolments import enrolment_secret


@pytest.fixture
def enrolment(fedcompute, tmp_path):
    """Runs `fedcompute enrolment` on a data directory of the test's own."""

    def run(*arguments):
        return fedcompute("enrolment", *arguments, "--data-dir", tmp_path / "data")

    return run


def test_the_secrets_go_to_a_private_file_and_nowhere_else(enrolment, tmp_path):
    file = tmp_path / "fleet.enrolments"
    result = enrolment("create", "--label", "fleet", "--count", 3, "--out", file, "--json")
    assert result.exit_code == 0, result.output
    enrolments = read_enrolments(file)
    assert json.loads(result.output)["ids"] == [one.id for one in enrolments]
    assert len({one.id for one in enrolments}) == len({one.secret for one in enrolments}) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shown = result.output + enrolment("list").output + enrolment("list", "--json").output
    settings = Settings(data_dir=tmp_path / "data")
    database = Database.open(settings.database)
    with database.read() as tx:
        for one in enrolments:
            assert enrolment_secret(tx, open_sealer(settings, database), one.id) == one.secret
            assert one.secret.hex() not in shown
        assert all(row.sealed_with for row in tx.execute(select(schema.enrolment)))
        acts = [row.action for row in tx.execute(select(schema.audit_log))]
    database.close()
    assert acts == ["enrolment.create"] * 3
    stored = b"".join(one.read_bytes() for one in (tmp_path / "data").glob("fedcompute.db*"))
    assert not any(one.secret in stored for one in enrolments)


def test_a_file_that_exists_is_not_overwritten_and_nothing_is_enrolled(enrolment, tmp_path):
    file = tmp_path / "kept"
    file.write_text("precious")
    assert enrolment("create", "--label", "fleet", "--out", file).exit_code == 1
    assert file.read_text() == "precious"
    assert "no enrolments" in enrolment("list").output


@pytest.mark.parametrize("label", ["", "x" * 41, "a\nb"])
def test_a_label_that_cannot_be_shown_is_refused_before_a_file_is_made(enrolment, tmp_path, label):
    assert enrolment("create", "--label", label, "--out", tmp_path / "file").exit_code == 1
    assert not (tmp_path / "file").exists()


def test_a_revoked_enrolment_is_listed_as_such_and_cannot_be_revoked_again(enrolment, tmp_path):
    enrolment("create", "--label", "fleet", "--out", tmp_path / "file")
    (one,) = read_enrolments(tmp_path / "file")
    assert enrolment("revoke", one.id).exit_code == 0
    assert "revoked" in enrolment("list").output
    again = enrolment("revoke", one.id)
    assert again.exit_code == 1
    assert "not_found" in again.output


def test_a_fleet_with_fewer_enrolments_than_devices_does_not_start(fedcompute, enrolment, tmp_path):
    file = tmp_path / "file"
    enrolment("create", "--label", "fleet", "--count", 2, "--out", file)
    result = fedcompute(
        "fleet", "run", "--population", "p", "--devices", 3, "--enrolments", file, "--log", tmp_path / "log"
    )
    assert result.exit_code == 1
    assert "2 enrolments for 3 devices" in result.output
    assert not (tmp_path / "log").exists()
