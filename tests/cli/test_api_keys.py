"""API keys from the first one on a new data directory to every command and program that uses one."""

import json
import re
import signal
import stat
import time

import httpx
import pytest

KEY = re.compile(r"fc_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")


@pytest.fixture
def make_key(program):
    """`make_key(data_dir, role)`: a key, made at the prompt."""

    def make(data_dir, role, *options):
        result = program("fedcompute", "api-key", "create", "--role", role, "--label", f"the {role}",
                         "--data-dir", data_dir, *options)  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert KEY.fullmatch(result.stdout.strip())
        return result.stdout.strip()

    return make


@pytest.fixture
def locked(start, tmp_path):
    """A server that wants keys: `listening`, `url`, ..., as it announces itself."""
    process = start(
        "fedcompute", "server", "--data-dir", tmp_path / "data", "--port", 0, "--require-api-keys", "--json",
        "--workers", 1,
    )  # fmt: skip
    return json.loads(process.stdout.readline())


def test_the_first_key_is_made_before_the_first_start_and_shown_once(make_key, program, tmp_path):
    key = make_key(tmp_path / "new", "operator")
    listed = program("fedcompute", "api-key", "list", "--data-dir", tmp_path / "new")
    assert "operator" in listed.stdout
    assert "live" in listed.stdout
    assert key[-43:] not in listed.stdout
    (one,) = json.loads(program("fedcompute", "api-key", "list", "--data-dir", tmp_path / "new", "--json").stdout)
    assert key.startswith(f"fc_{one['id']}_")
    assert (one["label"], one["role"], one["live"], one["expires"]) == ("the operator", "operator", True, None)


def test_a_key_can_go_into_a_file_that_only_its_owner_reads(program, tmp_path):
    arguments = ["api-key", "create", "--role", "viewer", "--label", "file", "--out", tmp_path / "key", "--days", "2"]
    result = program("fedcompute", *arguments, "--data-dir", tmp_path / "data", "--json")
    assert result.returncode == 0, result.stderr
    assert KEY.fullmatch((tmp_path / "key").read_text().strip())
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert not KEY.search(result.stdout + result.stderr)
    again = program("fedcompute", *arguments, "--data-dir", tmp_path / "data")
    assert again.returncode == 1
    assert (
        len(json.loads(program("fedcompute", "api-key", "list", "--data-dir", tmp_path / "data", "--json").stdout)) == 1
    )


def test_commands_send_the_key_of_a_file_or_of_the_environment(locked, make_key, program, tmp_path):
    viewer = make_key(tmp_path / "data", "viewer")
    (tmp_path / "key").write_text(f"{viewer}\n")
    task_list = ["task", "list", "--server", locked["url"], "--json"]
    refused = program("fedcompute", *task_list)
    assert refused.returncode == 1
    assert "api_key_missing" in refused.stderr
    assert "fedcompute api-key create" in refused.stderr
    assert program("fedcompute", *task_list, "--api-key-file", tmp_path / "key").stdout.strip() == "[]"
    assert program("fedcompute", *task_list, env={"FEDCOMPUTE_API_KEY": viewer}).stdout.strip() == "[]"
    ledger = ["privacy", "ledger", "--population", "p", "--server", locked["url"]]
    assert program("fedcompute", *ledger, env={"FEDCOMPUTE_API_KEY": viewer}).returncode == 0
    cancel = ["task", "cancel", "--population", "p", "--task-id", 1, "--server", locked["url"]]
    weak = program("fedcompute", *cancel, env={"FEDCOMPUTE_API_KEY": viewer})
    assert "role_insufficient" in weak.stderr
    for wrong in ("no key at all", "fc_é", f"{viewer}\nx-more: 1"):
        broken = program("fedcompute", *task_list, env={"FEDCOMPUTE_API_KEY": wrong})
        assert broken.returncode == 1
        assert wrong not in broken.stderr
        assert viewer not in broken.stderr
    missing = program("fedcompute", *task_list, "--api-key-file", tmp_path / "nothing")
    assert missing.returncode == 1
    assert "cannot be read" in missing.stderr


def test_a_revoked_key_opens_nothing_from_then_on(locked, make_key, program, tmp_path):
    key = make_key(tmp_path / "data", "operator")
    task_list = ["task", "list", "--server", locked["url"], "--json"]
    assert program("fedcompute", *task_list, env={"FEDCOMPUTE_API_KEY": key}).returncode == 0
    revoke = ["api-key", "revoke", key.split("_")[1], "--data-dir", tmp_path / "data"]
    assert program("fedcompute", *revoke).returncode == 0
    assert "was revoked" in program("fedcompute", *task_list, env={"FEDCOMPUTE_API_KEY": key}).stderr
    assert program("fedcompute", *revoke).returncode == 1


def test_what_is_done_at_the_prompt_is_in_the_audit_log_too(locked, make_key, program, tmp_path):
    key = make_key(tmp_path / "data", "operator")
    log = ["audit", "log", "--server", locked["url"]]
    (act,) = json.loads(program("fedcompute", *log, "--json", env={"FEDCOMPUTE_API_KEY": key}).stdout)
    assert act["actor"].startswith("prompt (")
    assert (act["action"], act["status"]) == ("api_key.create", 200)
    assert act["subject"] == f"{key.split('_')[1]} (the operator) operator"
    stored = program("fedcompute", "audit", "log", "--data-dir", tmp_path / "data", "--json").stdout
    assert json.loads(stored) == [act]
    told = program("fedcompute", *log, env={"FEDCOMPUTE_API_KEY": key}).stdout
    assert "api_key.create" in told
    assert key not in told


def test_a_task_is_built_shown_and_cloned_with_keys(locked, make_key, program, model, tmp_path):
    builder = {"FEDCOMPUTE_API_KEY": make_key(tmp_path / "data", "builder")}
    operator = {"FEDCOMPUTE_API_KEY": make_key(tmp_path / "data", "operator")}
    at = ["--server", locked["url"], "--json"]
    build = ["task", "build", "--model", model.saved, "--config", model.config, *at]
    refused = program("fedcompute", *build)
    assert refused.returncode == 1
    assert "401" in refused.stderr
    result = program("fedcompute", *build, env=builder)
    assert result.returncode == 0, result.stderr
    task = ["--population", "digits", "--task-id", 1]
    deadline = time.monotonic() + 60
    status = ""
    while status != "OPEN" and time.monotonic() < deadline:
        found = program("fedcompute", "task", "progress", *task, *at, env=builder)
        status = json.loads(found.stdout)["status"]
    assert status == "OPEN"
    told = program("fedcompute", "task", "progress", *task, *at[:2], env=builder).stdout
    assert "0 of 3 rounds released" in told
    artifacts = json.loads(program("fedcompute", "task", "artifacts", *task, *at, env=builder).stdout)
    assert [one["name"] for one in artifacts] == ["plan", "client-plan", "checkpoint", "client-checkpoint"]
    assert "role_insufficient" in program("fedcompute", "task", "cancel", *task, *at, env=builder).stderr
    assert program("fedcompute", "task", "cancel", *task, *at, env=operator).returncode == 0
    cloned = program("fedcompute", "task", "clone", *task, *at, env=builder)
    assert cloned.returncode == 0, cloned.stderr
    assert json.loads(cloned.stdout)["task_id"] == 3
    exported = program(
        "fedcompute", "model", "export", *task, *at, "--iteration", 0, "--model", model.keras, "--out",
        tmp_path / "out.keras", env=operator,
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr


def test_the_published_client_builds_through_a_builder_that_asks_whose_key_it_is(
    locked, make_key, start, program, model, tmp_path
):
    viewer, builder = make_key(tmp_path / "data", "viewer"), make_key(tmp_path / "data", "builder")
    process = start(
        "task_builder", "--port=0", f"--task_management_server={locked['url']}", "--require_api_keys",
    )  # fmt: skip
    address = re.search(r"http://\S+", process.stdout.readline())[0]
    client = [
        "task_builder_client", f"--task_builder_server={address}", f"--saved_model={model.saved}",
        f"--task_config={model.config}",
    ]  # fmt: skip
    wrong = builder[:-2] + ("AA" if builder[-2:] != "AA" else "BB")
    for arguments, words in (
        ([], "with an API key only"),
        (["--api_key=AIzaSomebodyElses"], "with an API key only"),
        ([f"--api_key={wrong}"], "does not take the API key"),
        ([f"--api_key={viewer}"], "needs the role builder"),
    ):
        refused = program(*client, *arguments)
        assert refused.returncode == 1
        assert words in refused.stderr
        assert wrong not in refused.stderr
    for arguments, env in (([f"--api_key={builder}", "--population_name=flag"], {}),
                           (["--population_name=env"], {"FEDCOMPUTE_API_KEY": builder})):  # fmt: skip
        result = program(*client, *arguments, env=env)
        assert result.returncode == 0, result.stderr
        assert builder not in result.stderr + result.stdout
    assert httpx.get(f"{address}/metrics").status_code == 401
    figures = httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {viewer}"}).text
    assert 'fedcompute_build_seconds_count{outcome="built"} 2.0' in figures
    operator = make_key(tmp_path / "data", "operator")
    log = program(
        "fedcompute", "audit", "log", "--server", locked["url"], "--json", env={"FEDCOMPUTE_API_KEY": operator}
    )
    created = [act for act in json.loads(log.stdout) if act["action"] == "task.create"]
    assert {act["subject"] for act in created} == {"flag/1", "flag/2", "env/1", "env/2"}
    assert {act["actor"] for act in created} == {f"{builder.split('_')[1]} (the builder)"}


def test_a_server_that_wants_keys_says_how_to_make_one(start, tmp_path):
    process = start("fedcompute", "server", "--data-dir", tmp_path / "data", "--host", "0.0.0.0", "--port", 0)
    text = "".join(process.stdout.readline() for _ in range(8))
    assert "operators need  an API key" in text
    assert f"fedcompute api-key create --role operator --label NAME --data-dir {tmp_path / 'data'}" in text
    process.send_signal(signal.SIGINT)
    assert "there is no API key, so nobody can manage tasks" in process.communicate(timeout=60)[1]


def test_a_key_that_would_be_sent_in_plain_text_over_a_network_is_remarked_on(program):
    arguments = ["task", "list", "--server", "http://server.invalid:8080"]
    result = program("fedcompute", *arguments, env={"FEDCOMPUTE_API_KEY": "fc_0f0f0f0f0f0f_" + "A" * 43})
    assert "the API key travels to server.invalid unencrypted" in result.stderr
    assert "AAAA" not in result.stderr
