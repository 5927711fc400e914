"""Settings from flags, environment, file and defaults."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from fedcompute.errors import OperationFailed
from fedcompute.server.configuration import (
    CONFIG_VARIABLE,
    configure,
    flag_of,
    kind_of,
    masked,
    render_json,
    render_toml,
    setting_fields,
    variable_of,
)
from fedcompute.server.kinds import kind_of_type
from fedcompute.server.security.operator_secret import open_sealer
from fedcompute.server.setting import about
from fedcompute.server.settings import RetryWindow, Settings
from fedcompute.storage.database import Database

FIELDS = [one.name for one in dataclasses.fields(Settings)]


@pytest.mark.parametrize("one", setting_fields(), ids=lambda one: one.name)
def test_every_setting_says_what_it_is_for_and_can_be_read_from_flag_variable_and_file(one):
    told = about(one)
    assert told.help.endswith("."), f"{one.name} needs setting(default, 'One sentence.', PANEL)"
    assert told.panel != "Other"
    assert flag_of(one.name).startswith("--")
    assert variable_of(one.name).startswith("FEDCOMPUTE_")
    kind = kind_of(one.name)
    if one.default not in (None, dataclasses.MISSING):
        written = tomllib.loads(f"value = {kind.write_toml(one.default)}")["value"]
        assert kind.read_toml(written) == one.default
        assert kind.read_text(kind.show(one.default)) == pytest.approx(one.default)


def test_a_secret_setting_does_not_stand_in_the_repr_of_the_settings():
    settings = Settings(database_url="postgresql://user:hunter2@host/name")
    assert "hunter2" not in repr(settings)


def test_a_password_is_never_shown_and_a_file_made_of_what_is_shown_is_whole():
    configuration = configure({}, {"FEDCOMPUTE_DATABASE_URL": "postgresql://user:hunter2@host/name?password=hunter3"})
    for text in (render_toml(configuration), render_json(configuration)):
        assert "hunter" not in text
        assert "postgresql://user:***@host/name?password=***" in text
    assert "database_url" not in tomllib.loads(render_toml(configuration))


def test_of_programs_that_give_tokens_the_arguments_are_not_shown_and_of_services_no_login():
    given = {
        "FEDCOMPUTE_KEY_SERVICE_A": "https://user:hunter2@one.example/v1",
        "FEDCOMPUTE_KEY_SERVICE_B": "https://two.example/v1",
        "FEDCOMPUTE_KEY_SERVICE_PUBLIC_URL": "https://one.example/keys?key=hunter3",
        "FEDCOMPUTE_KEY_SERVICE_TOKEN_A": "command:get-token --password hunter4",
        "FEDCOMPUTE_KEY_SERVICE_TOKEN_B": "file:/run/token",
        "FEDCOMPUTE_KEY_SERVICE_KMS_B": "aes:/run/key",
    }
    configuration = configure({}, given)
    for text in (render_toml(configuration), render_json(configuration), repr(configuration.settings)):
        assert "hunter" not in text
    shown = render_toml(configuration)
    for line in (
        '# key_service_token_a = "command:get-token ***"',
        'key_service_token_b = "file:/run/token"',
        'key_service_kms_a = "plain"',
        'key_service_kms_b = "aes:/run/key"',
        'key_service_b = "https://two.example/v1"',
    ):
        assert f"\n{line}" in shown


def test_a_url_without_secrets_is_shown():
    assert masked("database_url", "postgresql+psycopg://db/name") == "postgresql+psycopg://db/name"
    assert masked("database_url", "nonsense") == "***"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hunt?er2@host/name",
        "postgresql://user:hunt/er2@host/name",
        "postgresql://user:er2@hunt@host/name",
        "postgresql://user:hunt#er2@host/name",
        "postgresql://user:hunt?a=b&er2@host/name?password=er2",
        "postgresql://host/name?password=hunt@er2",
        "postgresql://host:5432/name?password=hunt@er2",
    ],
)
def test_a_password_with_any_character_in_it_is_never_shown(url):
    shown = masked("database_url", url)
    assert "hunt" not in shown
    assert "er2" not in shown


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prot = 1", ["line 2", "'prot'", "'port'"]),
        ("max-upload-bytes = 1", ["line 2", "'max_upload_bytes'"]),
        ("[server]", ["line 2", "'server'"]),
        ('port = "8080"', ["line 2", "port", "no whole number"]),
        ("port = true", ["port", "no whole number"]),
        ("upload_timeout = inf", ["upload_timeout", "no number"]),
        ("allow_plaintext_uploads = 1", ["allow_plaintext_uploads", "neither true nor false"]),
        ("retry_no_task = [1, 2, 3]", ["retry_no_task", "no window"]),
        ("data_dir = 3", ["data_dir", "no text"]),
        ("port = ", ["no TOML", "line 2"]),
    ],
)
def test_a_wrong_line_of_the_file_is_named(tmp_path, line, words):
    file = tmp_path / "server.toml"
    file.write_text(f"# settings\n{line}\n")
    with pytest.raises(OperationFailed) as refused:
        configure({}, {}, file)
    told = f"{refused.value} {refused.value.remedy}"
    assert str(file) in told
    for word in words:
        assert word in told


def test_the_value_of_a_secret_stands_in_no_error(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('database_url = ["hunter2"]')
    with pytest.raises(OperationFailed) as refused:
        configure({}, {}, file)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FEDCOMPUTE_PORT", "tcp://10.0.0.1:80", "FEDCOMPUTE_PORT"),
        ("FEDCOMPUTE_PROT", "80", "did you mean FEDCOMPUTE_PORT"),
        ("FEDCOMPUTE_PUBLIC_URL", "", "set and empty"),
        ("FEDCOMPUTE_CONFIG", " ", "set and empty"),
        ("FEDCOMPUTE_ALLOW_PLAINTEXT_UPLOADS", "maybe", "neither true nor false"),
        ("FEDCOMPUTE_WORKERS", "-1", "from FEDCOMPUTE_WORKERS"),
        ("FEDCOMPUTE_CONFIG", "/nowhere/server.toml", "/nowhere/server.toml"),
    ],
)
def test_a_wrong_variable_is_named_instead_of_meaning_the_default(variable, value, words):
    with pytest.raises(OperationFailed) as refused:
        configure({}, {variable: value})
    assert words in f"{refused.value} {refused.value.remedy}"


@pytest.mark.parametrize("value", ["", "short", "CHANGE-ME-to-32-random-bytes-in-base64-or-hex"])
def test_an_operator_secret_that_is_none_is_refused_instead_of_another_being_made(tmp_path, value):
    database = Database.open(Settings(data_dir=tmp_path).database)
    try:
        with pytest.raises(OperationFailed, match="the operator secret"):
            open_sealer(Settings(data_dir=tmp_path), database, {"FEDCOMPUTE_SECRET": value})
    finally:
        database.close()
    assert not (tmp_path / "secret").exists()


def test_variables_of_others_are_none_of_our_business():
    assert configure({}, {"FEDCOMPUTE_CACHE_DIR": "", "HOME": "/root", "FEDCOMPUTE_SOMETHING_ELSE": "1"})


def test_a_window_is_written_as_text_as_a_number_or_as_two(tmp_path):
    file = tmp_path / "server.toml"
    for written in ('"2:3"', "[2, 3]", "[2.0, 3.0]"):
        file.write_text(f"retry_no_task = {written}")
        assert configure({}, {}, file).settings.retry_no_task == RetryWindow(2, 3)
    assert configure({"retry_no_task": "2"}, {}).settings.retry_no_task == RetryWindow(2, 2)


def test_the_file_may_be_named_by_a_variable_and_the_flag_wins(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(f'host = "{name}"')
    assert configure({}, {CONFIG_VARIABLE: str(tmp_path / "one")}).settings.host == "one"
    assert configure({}, {CONFIG_VARIABLE: str(tmp_path / "one")}, tmp_path / "two").settings.host == "two"


def test_a_list_is_repeated_flags_commas_or_a_list_of_the_file():
    kind = kind_of_type(tuple[str, ...])
    assert kind.read_text("a, b") == ("a", "b")
    assert kind.read_text("") == ()
    assert kind.read_toml(["a,b", "c"]) == ("a,b", "c")
    assert tomllib.loads(f"v = {kind.write_toml(('a', 'b'))}")["v"] == ["a", "b"]
    assert kind_of_type(tuple[Path, ...]).read_text("x,y") == (Path("x"), Path("y"))


def test_text_of_any_kind_survives_the_file():
    for text in ('say "x"', "back\\slash", "tab\t", "\x7f\x01", "smile \U0001f600", "line\nbreak"):
        assert tomllib.loads(f"v = {kind_of('host').write_toml(text)}")["v"] == text
