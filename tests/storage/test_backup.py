"""Backups of real databases and stores of both kinds, restored into both kinds."""

import gzip
import json
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.privacy.chain import Release
from fedcompute.storage import backup, schema
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.database import Database
from fedcompute.storage.iterations import close_and_open_next, get_iteration, move_iteration, next_iteration
from fedcompute.storage.paths import (
    AGGREGATED,
    GRADIENT,
    MODEL,
    aggregate_path,
    client_checkpoint_path,
    client_only_plan_path,
    server_checkpoint_path,
    server_plan_path,
    update_path,
)
from fedcompute.storage.releases import Standing, ledger_entries
from fedcompute.storage.schema import IterationStatus
from fedcompute.storage.tasks import get_task


@pytest.fixture
def blobs(tmp_path):
    return open_blob_store(str(tmp_path / "blobs"))


@pytest.fixture
def full(database, blobs, collecting, uploaded, published, now):
    """A task with one released round, and a second that collects; returns the second's key and sessions."""
    first = collecting(max_aggregation_size=9)
    task = first.task
    artifacts = [client_only_plan_path(task), server_plan_path(task), server_checkpoint_path(task, 0)]
    for path in [*artifacts, client_checkpoint_path(task, 0), server_checkpoint_path(task, 1)]:
        blobs.put(MODEL, path, f"content of {path}".encode())
    blobs.put(MODEL, client_checkpoint_path(task, 1), gzip.compress(b"client"))
    for session in uploaded(first, 2):
        blobs.put(GRADIENT, update_path(task, 1, session), b"raw update of a released round")
    release = Release(
        population="digits", task_id=1, iteration_id=1, released="model", mechanism="FIXED_GAUSSIAN",
        event={"class": "GaussianDpEvent", "noise_multiplier": 0.1 + 0.2}, claim=None, clip_norm=1.5, report_goal=2,
        contributions=2, cumulative_epsilon=3.25, delta=1e-6,
    )  # fmt: skip
    with database.write() as tx:
        move_iteration(tx, first, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
        move_iteration(tx, first, IterationStatus.AGGREGATING, IterationStatus.APPLYING, now)
        following = next_iteration(get_task(tx, task), get_iteration(tx, first))
        assert close_and_open_next(
            tx, first, metrics={"loss": 0.1, "none": None}, releases=[release], standing=Standing(0, None),
            following=following, now=now,
        )  # fmt: skip
        tx.execute(
            schema.server_secret.insert().values(
                name="url_signing", value=bytes(range(256)), sealed_with="abcdef", created=now
            )
        )
        tx.execute(schema.lease.insert().values(name="digits/1/2/0", holder="me", expires=now + timedelta(seconds=10)))
    sessions = uploaded(following.key, 2)
    batch = published(following.key, sessions[:1])
    for session in sessions:
        blobs.put(GRADIENT, update_path(task, 2, session), f"update of {session}".encode())
    # Nobody refers to it: its batch is not finished, and the round's result is computed anew.
    blobs.put(AGGREGATED, aggregate_path(task, 2, batch.batch_id), b"unfinished")
    blobs.put(MODEL, server_checkpoint_path(task, 2), b"a result that these rows do not know")
    return following.key, sessions


def rows_of(database):
    with database.read() as tx:
        return {
            table.name: tx.execute(select(table).order_by(*table.primary_key.columns)).all()
            for table in schema.metadata.sorted_tables
            if table.name != "lease"
        }


@pytest.fixture
def empty(empty_url, tmp_path):
    opened = Database.open(empty_url)
    yield opened, open_blob_store(str(tmp_path / "restored"))
    opened.close()


def test_a_restored_database_has_every_row_and_every_object_that_rows_refer_to(
    database, blobs, full, empty, tmp_path, now
):
    key, sessions = full
    manifest = backup.back_up(database, blobs, tmp_path / "backup", now)
    assert (manifest.missing, manifest.sealed_with, manifest.objects) == ([], ["abcdef"], 8)
    target, objects = empty
    assert backup.restore(target, objects, tmp_path / "backup") == manifest
    assert rows_of(target) == rows_of(database)
    with target.read() as tx:
        assert tx.execute(select(schema.lease)).all() == []
        assert len(ledger_entries(tx, "digits")) == 1
    assert objects.list(GRADIENT, "") == sorted(update_path(key.task, 2, one) for one in sessions)
    assert objects.list(AGGREGATED, "") == []
    assert server_checkpoint_path(key.task, 2) not in objects.list(MODEL, "")
    for bucket in (MODEL, GRADIENT):
        for path in objects.list(bucket, ""):
            assert objects.get(bucket, path, 999) == blobs.get(bucket, path, 999)


def test_a_backup_of_one_kind_of_database_restores_into_the_other(
    sqlite_template, postgresql_url, tmp_path, collecting, database, blobs, full, now
):
    backup.back_up(database, blobs, tmp_path / "backup", now)
    kind = "postgresql" if "sqlite" in str(database._engine.url) else "sqlite"
    url = f"sqlite:///{tmp_path}/other.db"
    if kind == "postgresql":
        url = postgresql_url
    other = Database.open(url)
    backup.restore(other, open_blob_store(str(tmp_path / "restored")), tmp_path / "backup")
    assert rows_of(other) == rows_of(database)
    other.close()


def test_the_same_rows_give_the_same_files(database, blobs, full, tmp_path, now):
    first = backup.back_up(database, blobs, tmp_path / "a", now)
    assert backup.back_up(database, blobs, tmp_path / "b", now).tables == first.tables


def test_a_backup_is_for_its_owner_only(database, blobs, full, tmp_path, now):
    backup.back_up(database, blobs, tmp_path / "backup", now)
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o700


def test_a_backup_goes_into_an_empty_folder_only(database, blobs, tmp_path, now):
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "mine").write_text("x")
    with pytest.raises(OperationFailed) as caught:
        backup.back_up(database, blobs, tmp_path / "backup", now)
    assert caught.value.reason is Reason.BACKUP_TARGET_IN_USE


def test_required_objects_that_are_not_there_are_named(database, blobs, full, tmp_path, now):
    key, sessions = full
    blobs.delete(MODEL, server_checkpoint_path(key.task, 1))
    blobs.delete(GRADIENT, update_path(key.task, 2, sessions[1]))
    manifest = backup.back_up(database, blobs, tmp_path / "backup", now)
    assert manifest.missing == [
        f"gradient/{update_path(key.task, 2, sessions[1])}", "model/digits/1/1/s/0/checkpoint",
    ]  # fmt: skip


def test_a_restore_refuses_stores_that_hold_anything_and_changes_nothing(database, blobs, full, empty, tmp_path, now):
    backup.back_up(database, blobs, tmp_path / "backup", now)
    before = rows_of(database)
    target, objects = empty
    for stores in ((database, objects), (target, blobs)):
        with pytest.raises(OperationFailed) as caught:
            backup.restore(*stores, tmp_path / "backup")
        assert caught.value.reason is Reason.BACKUP_TARGET_IN_USE
    assert rows_of(database) == before
    assert not any(rows_of(target).values())
    assert objects.list(MODEL, "") == []


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "blobs.jsonl.gz", "tables/task.jsonl.gz", "tables/privacy_ledger.jsonl.gz",
     "blobs/model/digits/1/1/s/0/checkpoint"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flipped", "gone", "cut"])
def test_a_damaged_backup_is_refused_before_anything_is_written(
    database, blobs, full, empty, tmp_path, now, name, damage
):
    folder = tmp_path / "backup"
    backup.back_up(database, blobs, folder, now)
    path = folder / name
    if damage == "flipped":
        _flip(path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    target, objects = empty
    with pytest.raises(ArtifactInvalid) as caught:
        backup.restore(target, objects, folder)
    assert caught.value.reason is Reason.BACKUP_DAMAGED
    assert not any(rows_of(target).values())
    assert objects.list(MODEL, "") == []


def _rewritten(folder, change, table="privacy_ledger"):
    """A backup whose ledger, or manifest, was changed by someone who knows how checksums are made."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("digest")
    path = folder / "tables" / f"{table}.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    change(manifest, lines)
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    manifest["tables"][table]["sha256"] = backup.sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": backup._digest(manifest)}))


def test_a_ledger_that_is_no_chain_is_refused_and_nothing_is_restored(database, blobs, full, empty, tmp_path, now):
    folder = tmp_path / "backup"
    backup.back_up(database, blobs, folder, now)

    def cheaper(_, lines):
        lines[1] = lines[1].replace(b"3.25", b"0.25")

    _rewritten(folder, cheaper)
    target, objects = empty
    with pytest.raises(ArtifactInvalid) as caught:
        backup.restore(target, objects, folder)
    assert caught.value.reason is Reason.LEDGER_TAMPERED
    assert not any(rows_of(target).values())


def test_a_ledger_that_was_cut_off_is_refused(database, blobs, full, empty, tmp_path, now):
    folder = tmp_path / "backup"
    backup.back_up(database, blobs, folder, now)

    def cut(manifest, lines):
        del lines[1:]
        manifest["tables"]["privacy_ledger"]["rows"] = 0

    _rewritten(folder, cut)
    target, objects = empty
    with pytest.raises(ArtifactInvalid) as caught:
        backup.restore(target, objects, folder)
    assert caught.value.reason is Reason.LEDGER_TAMPERED


def test_a_backup_of_another_schema_or_format_is_refused(database, blobs, full, empty, tmp_path, now):
    folder = tmp_path / "backup"
    backup.back_up(database, blobs, folder, now)
    target, objects = empty
    for name, value in (("schema", "0001"), ("version", 2), ("format", "tar")):
        kept = (folder / "manifest.json").read_text()
        _rewritten(folder, lambda manifest, _, name=name, value=value: manifest.update({name: value}))
        with pytest.raises(OperationFailed) as caught:
            backup.restore(target, objects, folder)
        assert caught.value.reason is Reason.BACKUP_FOREIGN
        (folder / "manifest.json").write_text(kept)


def test_an_index_that_leads_out_of_the_backup_is_refused(database, blobs, full, empty, tmp_path, now):
    folder = tmp_path / "backup"
    backup.back_up(database, blobs, folder, now)
    index = folder / "blobs.jsonl.gz"
    index.write_bytes(gzip.compress(json.dumps(["model", "../../../etc/passwd", 1, "00"]).encode()))
    _rewritten(folder, lambda manifest, _: manifest.update(index_sha256=backup.sha256_of(index)))
    with pytest.raises(ArtifactInvalid) as caught:
        backup.restore(*empty, folder)
    assert caught.value.reason is Reason.BACKUP_DAMAGED


def test_a_backup_goes_to_and_comes_from_s3(sqlite_template, s3, tmp_path, now, database, blobs, full):
    source = open_blob_store(f"s3://{s3.bucket()}/live")
    for bucket in (MODEL, GRADIENT):
        for path in blobs.list(bucket, ""):
            source.put(bucket, path, blobs.get(bucket, path, 999))
    backup.back_up(database, source, tmp_path / "backup", now)
    target = open_blob_store(f"s3://{s3.bucket()}")
    other = Database.open(f"sqlite:///{tmp_path}/other.db")
    backup.restore(other, target, tmp_path / "backup")
    assert len(target.list(MODEL, "")) == 6
    other.close()
