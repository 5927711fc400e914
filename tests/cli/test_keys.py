import json

import pytest


def test_keys_are_listed_and_replaced_from_a_prompt(fedcompute, server):
    (first,) = json.loads(fedcompute("keys", "list", "--server", server.url, "--json").output)
    result = fedcompute("keys", "rotate", "--server", server.url)
    assert result.exit_code == 0, result.output
    listed = fedcompute("keys", "list", "--server", server.url).output
    assert f"{first['id']}  withdrawn" in listed
    new = next(line.split()[0] for line in listed.splitlines() if "published" in line)
    assert new in result.output
    (again, *others) = json.loads(fedcompute("keys", "list", "--server", server.url, "--json").output)
    assert (again["id"], again["published"]) == (new, True)
    assert not any(key["published"] for key in others)


def test_the_operator_secret_is_checked_and_replaced_from_a_prompt(fedcompute, tmp_path, monkeypatch):
    monkeypatch.delenv("FEDCOMPUTE_SECRET", raising=False)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("one", "two"):
        (tmp_path / name).write_text(name * 20)
        (tmp_path / name).chmod(0o600)
    enrol = ("enrolment", "create", "--label", "phone", "--data-dir", data, "--out")
    assert fedcompute(*enrol, tmp_path / "enrolled").exit_code == 0
    before = fedcompute("secret", "check", "--data-dir", data)
    assert before.exit_code == 0, before.output
    done = json.loads(fedcompute("secret", "rotate", "--data-dir", data, "--json").output)
    assert done["old"] in before.output
    assert done["values"] == 1
    assert json.loads(fedcompute("secret", "check", "--data-dir", data, "--json").output) == {"id": done["new"]}
    result = fedcompute("secret", "rotate", "--data-dir", data, "--new-secret-file", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert "start every server with the new one" in result.output
    # The data directory's own secret is no longer the one.
    result = fedcompute("secret", "check", "--data-dir", data)
    assert result.exit_code == 1
    assert done["new"] in result.output
    # Nor does anything new get sealed with it.
    assert fedcompute(*enrol, tmp_path / "more").exit_code == 1
    for text in ("oneone", (data / "secret").read_text().strip()):
        assert text not in result.output
    given = ("--data-dir", data, "--secret-file", tmp_path / "one")
    assert fedcompute("secret", "rotate", *given).exit_code == 1
    assert fedcompute("secret", "rotate", *given, "--new-secret-file", tmp_path / "two").exit_code == 0
    assert fedcompute("secret", "check", "--data-dir", data, "--secret-file", tmp_path / "two").exit_code == 0


@pytest.mark.parametrize("command", [("keys", "list"), ("keys", "rotate")])
def test_a_server_that_is_not_there_is_a_block(fedcompute, command):
    result = fedcompute(*command, "--server", "http://localhost:1")
    assert result.exit_code == 1
    assert "Error:" in result.output
