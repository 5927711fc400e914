from datetime import UTC, datetime, timedelta

from fedcompute.storage.api_keys import Role, create_api_key
from fedcompute.storage.audit import Act, forget_strangers, list_acts, record

NOW = datetime(2026, 5, 4, 3, 2, 1, 5, tzinfo=UTC)


def act(subject="p/1", **changes):
    return Act(**{"actor": "loopback", "role": "operator", "action": "task.cancel", "subject": subject, "status": 200,
                  "request_id": "r", **changes})  # fmt: skip


def test_acts_are_read_back_newest_first_and_page_by_page(database):
    with database.write() as tx:
        for index in range(5):
            record(tx, act(f"p/{index}"), NOW + timedelta(seconds=index))
    with database.read() as tx:
        whole = list_acts(tx)
        assert [row.act for row in whole] == [act(f"p/{index}") for index in (4, 3, 2, 1, 0)]
        assert whole[0].created == NOW + timedelta(seconds=4)
        assert list_acts(tx, after=whole[1].id, limit=2) == whole[2:4]
        assert list_acts(tx, after=whole[4].id) == []


def test_hostile_text_becomes_one_short_printable_line(database):
    with database.write() as tx:
        record(tx, act("a\nb\0c\x1b[2K\u202e" + "x" * 1000, actor="y" * 100, request_id="z" * 100), NOW)
    with database.read() as tx:
        (row,) = list_acts(tx)
    assert row.act.subject.startswith("a?b?c?[2K?xxx")
    assert (len(row.act.subject), len(row.act.actor), len(row.act.request_id)) == (256, 64, 64)


def test_of_a_key_that_somebody_took_for_a_name_only_the_id_is_kept(database):
    with database.write() as tx:
        key, text = create_api_key(tx, Role.VIEWER, "label", NOW)
        for subject in (text, f"digits/{text}", text[:-3], f"{text} {text}"):
            record(tx, act(subject), NOW)
    with database.read() as tx:
        subjects = [row.act.subject for row in list_acts(tx)]
    assert all(f"fc_{key.id}_***" in subject for subject in subjects)
    assert not any(text[20:40] in subject for subject in subjects)


def test_an_act_is_kept_only_with_the_change_that_it_tells_of(database):
    class Undone(Exception): ...

    try:
        with database.write() as tx:
            record(tx, act(), NOW)
            raise Undone
    except Undone:
        pass
    with database.read() as tx:
        assert list_acts(tx) == []


def test_only_refusals_of_strangers_are_ever_forgotten(database):
    stranger = {"actor": "anonymous", "role": "none", "status": 401}
    with database.write() as tx:
        record(tx, act("done"), NOW)
        record(tx, act("tried", status=403), NOW)
        record(tx, act("named", actor="anonymous", role="viewer"), NOW)
        record(tx, act("old", **stranger), NOW)
        record(tx, act("new", **stranger), NOW + timedelta(hours=1))
        assert forget_strangers(tx, NOW + timedelta(hours=1)) == 1
        assert {row.act.subject for row in list_acts(tx)} == {"done", "tried", "named", "new"}
