import pytest
from sqlalchemy import select

from fedcompute.crypto.sealing import sealer_of
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.storage import schema
from fedcompute.storage.enrolments import (
    EnrolmentRow,
    NewEnrolment,
    create_enrolment,
    enrolment_secret,
    list_enrolments,
    revoke_enrolment,
)

SEALER = sealer_of(b"x" * 32)
NEW = NewEnrolment("one", "label", b"a secret of thirty-two bytes ...")


@pytest.fixture
def enrolled(database, now):
    with database.write() as tx:
        return create_enrolment(tx, SEALER, NEW, now)


def test_the_secret_is_stored_sealed_and_opens_with_the_operator_secret_only(database, enrolled):
    with database.read() as tx:
        row = tx.execute(select(schema.enrolment)).one()
        assert NEW.secret not in row.secret
        assert row.sealed_with == SEALER.id
        assert enrolment_secret(tx, SEALER, "one") == NEW.secret
        with pytest.raises(ArtifactInvalid) as refusal:
            enrolment_secret(tx, sealer_of(b"y" * 32), "one")
    assert refusal.value.reason is Reason.SECRET_UNREADABLE
    assert NEW.secret.decode() not in repr(NEW)


def test_a_sealed_secret_opens_for_its_own_enrolment_only(database, enrolled, now):
    with database.write() as tx:
        create_enrolment(tx, SEALER, NewEnrolment("two", "label", b"z" * 32), now)
        stolen = tx.execute(select(schema.enrolment.c.secret).where(schema.enrolment.c.id == "one")).scalar_one()
        tx.execute(schema.enrolment.update().where(schema.enrolment.c.id == "two").values(secret=stolen))
    with database.read() as tx, pytest.raises(ArtifactInvalid):
        enrolment_secret(tx, SEALER, "two")


def test_a_revoked_enrolment_has_no_secret_any_more_and_stays_on_the_list(database, enrolled, now):
    assert enrolled == EnrolmentRow("one", "label", now, None)
    with database.write() as tx:
        assert revoke_enrolment(tx, "one", now)
        assert enrolment_secret(tx, SEALER, "one") is None
        assert enrolment_secret(tx, SEALER, "nobody") is None
        assert list_enrolments(tx) == [EnrolmentRow("one", "label", now, now)]


def test_the_list_comes_in_pages(database, now):
    with database.write() as tx:
        for index in range(5):
            create_enrolment(tx, SEALER, NewEnrolment(f"{index}", "label", b"s"), now)
        pages = [list_enrolments(tx, limit=2), list_enrolments(tx, after="1", limit=2), list_enrolments(tx, after="3")]
    assert [[one.id for one in page] for page in pages] == [["0", "1"], ["2", "3"], ["4"]]
