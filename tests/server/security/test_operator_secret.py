"""The operator secret, from first start to rotation, with real servers and their files."""

import asyncio
import sqlite3
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy import text

from fedcompute.app import create_app
from fedcompute.crypto.keys import parse_public_keys
from fedcompute.crypto.sealing import place, sealer_of
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.server.security.operator_secret import make_secret_file, open_sealer, read_secret_file
from fedcompute.server.security.secret_rotation import rotate_secret
from fedcompute.storage.database import Database
from fedcompute.storage.secrets import private_keys, sealed_with

KEYS = "/.well-known/odp/v1/public-keys"


@pytest.fixture(autouse=True)
def no_secret_in_the_environment(monkeypatch):
    monkeypatch.delenv("FEDCOMPUTE_SECRET", raising=False)


def stop(running):
    running.stop()
    running.stop = lambda: None


def published(running):
    return parse_public_keys(running.api.http.get(running.api.url + KEYS).content)


def everything_stored(data_dir):
    """All bytes of the database, of its log, and of every blob."""
    return b"".join(
        path.read_bytes() for path in sorted(data_dir.rglob("*")) if path.is_file() and path.name != "secret"
    )


def plain_values(context):
    """(table, column, key column, name) -> what is sealed there."""
    rows = {}
    with context.database.read() as tx:
        for key_id, private in private_keys(tx, context.sealer).items():
            rows["encryption_key", "private_key", "id", key_id] = private
        for name, value, sealer_id in tx.execute(text("SELECT name, value, sealed_with FROM server_secret")):
            opened = context.sealer.open(place("server_secret", name), bytes(value), sealer_id)
            rows["server_secret", "value", "name", name] = opened
    return rows


def starts(settings):
    """Starts and stops an application; raises what keeps it from starting."""

    async def run():
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run())


def test_a_first_start_makes_a_secret_for_its_owners_eyes_and_a_second_uses_it(run_server):
    running = run_server()
    path = running.settings.data_dir / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret, keys = path.read_bytes(), published(running)
    assert len(secret.strip()) >= 43
    stop(running)
    again = run_server()
    assert path.read_bytes() == secret
    assert published(again) == keys


@pytest.mark.parametrize("database", ["", "apart/rows.db"])
def test_a_data_directory_that_a_server_makes_is_for_its_owner_only(run_server, tmp_path, database):
    data = tmp_path / "made"
    run_server(data_dir=data, **({"database_url": f"sqlite:///{tmp_path / database}"} if database else {}))
    made = [data, (tmp_path / database).parent] if database else [data]
    assert [stat.S_IMODE(one.stat().st_mode) for one in made] == [0o700] * len(made)
    files = [one for folder in made for one in folder.iterdir() if one.is_file()]
    assert len(files) >= 3
    assert {stat.S_IMODE(one.stat().st_mode) for one in files} == {0o600}


def test_a_copied_database_alone_reveals_no_private_key_and_no_secret(run_server):
    running = run_server()
    context = running.app.state.context
    with context.database.read() as tx:
        (private,) = private_keys(tx, context.sealer).values()
    assert X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() == published(running)[0].key
    stored = everything_stored(running.settings.data_dir)
    for secret in (private, context.url_key, context.noise_key):
        assert secret not in stored


def test_what_an_older_release_stored_in_plain_is_sealed_at_start_and_gone_from_the_file(run_server):
    running = run_server()
    keys, context = published(running), running.app.state.context
    before = plain_values(context)
    stop(running)
    data_dir = running.settings.data_dir
    with sqlite3.connect(data_dir / "fedcompute.db") as database:
        for (table, column, key, name), value in before.items():
            database.execute(f"UPDATE {table} SET {column} = ?, sealed_with = NULL WHERE {key} = ?", (value, name))
    database.close()
    # With nothing sealed in it another secret may be made.
    (data_dir / "secret").unlink()
    assert all(value in everything_stored(data_dir) for value in before.values())
    again = run_server()
    assert published(again) == keys
    assert plain_values(again.app.state.context) == before
    stored = everything_stored(data_dir)
    assert not any(value in stored for value in before.values())


def test_a_server_whose_secret_is_gone_or_another_does_not_start_and_names_both(run_server, hand_made, tmp_path):
    running = run_server()
    stop(running)
    settings = running.settings
    path = settings.data_dir / "secret"
    right = sealer_of(path.read_bytes())
    path.rename(tmp_path / "kept")
    database = Database.open(settings.database)
    with pytest.raises(ArtifactInvalid) as raised:
        open_sealer(settings, database)
    assert right.id in raised.value.detail
    assert not path.exists()
    make_secret_file(path)
    wrong = sealer_of(path.read_bytes())
    with pytest.raises(ArtifactInvalid) as raised:
        open_sealer(settings, database)
    assert raised.value.reason is Reason.SECRET_UNREADABLE
    assert {right.id, wrong.id} <= set(raised.value.detail.replace(",", " ").split())
    assert "FEDCOMPUTE_SECRET" in raised.value.remedy
    database.close()
    with pytest.raises(ArtifactInvalid):
        starts(settings)
    (tmp_path / "kept").replace(path)
    assert published(run_server())


def test_a_given_secret_comes_from_a_file_or_a_variable_and_not_from_both(hand_made, tmp_path):
    (tmp_path / "mine").write_text("m" * 40 + "\n")
    (tmp_path / "short").write_text("pass")
    settings = hand_made.settings_of(tmp_path / "data", secret_file=tmp_path / "mine")
    plain = hand_made.settings_of(tmp_path / "data")
    settings.data_dir.mkdir()
    database = Database.open(settings.database)
    assert open_sealer(settings, database, {}) == sealer_of(b"m" * 40)
    assert open_sealer(plain, database, {"FEDCOMPUTE_SECRET": "m" * 40}) == sealer_of(b"m" * 40)
    assert not (settings.data_dir / "secret").exists()
    for wrong, environment in (
        (settings, {"FEDCOMPUTE_SECRET": "m" * 40}),
        (hand_made.settings_of(tmp_path / "data", secret_file=tmp_path / "none"), {}),
        (hand_made.settings_of(tmp_path / "data", secret_file=tmp_path / "short"), {}),
        (plain, {"FEDCOMPUTE_SECRET": "pass"}),
    ):
        with pytest.raises(OperationFailed) as raised:
            open_sealer(wrong, database, environment)
        assert raised.value.reason is Reason.SETTINGS_INVALID
        assert "pass" not in str(raised.value)
    database.close()


def test_a_secret_that_others_may_read_is_warned_about(tmp_path, caplog):
    path = tmp_path / "open"
    path.write_bytes(b"m" * 40)
    path.chmod(0o644)
    read_secret_file(path)
    assert "chmod 600" in caplog.text
    assert "mmm" not in caplog.text


def test_whoever_makes_the_secret_file_second_gets_the_first_ones(tmp_path):
    make_secret_file(tmp_path / "secret")
    first = (tmp_path / "secret").read_bytes()
    make_secret_file(tmp_path / "secret")
    assert (tmp_path / "secret").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_server_goes_on_under_a_new_secret_with_the_keys_that_it_had(run_server, hand_made):
    running = run_server()
    keys, api, process = published(running), running.api, hand_made.process_of()
    task_id = api.open_task("before", process, goal=1)
    body = api.seal(hand_made.update_of(process, hand_made.initial))
    stop(running)
    data_dir = running.settings.data_dir
    old = (data_dir / "secret").read_bytes()
    done = rotate_secret(running.settings, None, {})
    assert done.values >= 3
    assert done.old == sealer_of(old).id
    assert (data_dir / "secret").read_bytes() != old
    assert done.old_file.read_bytes() == old
    assert stat.S_IMODE((data_dir / "secret").stat().st_mode) == 0o600
    assert not (data_dir / "secret.new").exists()
    again = run_server()
    assert published(again) == keys
    again.api.contribute("before", body=body)
    assert again.api.wait_for("before", task_id, "COMPLETED")["rejections"] == {}


def test_a_rotation_that_was_cut_off_before_or_after_its_transaction_is_finished_by_the_next(run_server, monkeypatch):
    from fedcompute.server.security import secret_rotation

    running = run_server()
    keys = published(running)
    stop(running)
    settings = running.settings

    def killed(*_):
        raise KeyboardInterrupt

    for step, is_sealed_anew in (("_reseal", False), ("suppress", True)):
        monkeypatch.setattr(secret_rotation, step, killed)
        with pytest.raises(KeyboardInterrupt):
            rotate_secret(settings, None, {})
        monkeypatch.undo()
        if is_sealed_anew:
            with pytest.raises(ArtifactInvalid):
                starts(settings)
        else:
            starts(settings)
    done = rotate_secret(settings, None, {})
    assert done.values == 0
    assert published(run_server()) == keys


def test_no_secret_is_replaced_under_a_running_server(run_server):
    running = run_server()
    with pytest.raises(OperationFailed) as raised:
        rotate_secret(running.settings, None, {})
    assert raised.value.reason is Reason.DATA_IN_USE


def test_a_new_secret_is_named_where_the_present_one_was_given(run_server, tmp_path):
    (tmp_path / "one").write_text("1" * 40)
    (tmp_path / "two").write_text("2" * 40)
    running = run_server(secret_file=tmp_path / "one")
    stop(running)
    for new in (None, tmp_path / "one", tmp_path / "none"):
        with pytest.raises(OperationFailed) as raised:
            rotate_secret(running.settings, new, {})
        assert raised.value.reason is Reason.SETTINGS_INVALID
    done = rotate_secret(running.settings, tmp_path / "two", {})
    assert (done.new, done.old_file) == (sealer_of(b"2" * 40).id, None)
    database = Database.open(running.settings.database)
    with database.read() as tx:
        assert sealed_with(tx) == {done.new}
    database.close()
    assert published(run_server(secret_file=tmp_path / "two"))
