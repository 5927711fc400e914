"""API keys from the first one on a new data directory to every command and program that uses one."""

import json
import re
import signal
import stat
import time
from types import SimpleNamespace

import httpx
import pytest

KEY = re.compile(r"fc_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")


@pytest.fixture(scope="module")
def make_key(fedcompute):
    """`make_key(data_dir, role)`: a key, made at the prompt."""

    def make(data_dir, role, *options):
        result = fedcompute("api-key", "create", "--role", role, "--label", f"the {role}",
                            "--data-dir", data_dir, *options)  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert KEY.fullmatch(result.stdout.strip())
        return result.stdout.strip()

    return make


@pytest.fixture(scope="module")
def locked(start_once, tmp_path_factory):
    """A server that wants keys: its `url` and `data_dir`."""
    data_dir = tmp_path_factory.mktemp("locked")
    process = start_once(
        "fedcompute", "server", "--data-dir", data_dir, "--port", 0, "--require-api-keys", "--json", "--workers", 1,
    )  # fmt: skip
    return SimpleNamespace(url=json.loads(process.stdout.readline())["url"], data_dir=data_dir)


def test_the_first_key_is_made_before_the_first_start_and_shown_once(make_key, fedcompute, tmp_path):
    key = make_key(tmp_path / "new", "operator")
    listed = fedcompute("api-key", "list", "--data-dir", tmp_path / "new")
    assert "operator" in listed.stdout
    assert "live" in listed.stdout
    assert key[-43:] not in listed.stdout
    (one,) = json.loads(fedcompute("api-key", "list", "--data-dir", tmp_path / "new", "--json").stdout)
    assert key.startswith(f"fc_{one['id']}_")
    assert (one["label"], one["role"], one["live"], one["expires"]) == ("the operator", "operator", True, None)


def test_a_key_can_go_into_a_file_that_only_its_owner_reads(program, fedcompute, tmp_path):
    arguments = ["api-key", "create", "--role", "viewer", "--label", "file", "--out", tmp_path / "key", "--days", "2"]
    result = program("fedcompute", *arguments, "--data-dir", tmp_path / "data", "--json")
    assert result.returncode == 0, result.stderr
    assert KEY.fullmatch((tmp_path / "key").read_text().strip())
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert not KEY.search(result.stdout + result.stderr)
    assert fedcompute(*arguments, "--data-dir", tmp_path / "data").exit_code == 1
    assert len(json.loads(fedcompute("api-key", "list", "--data-dir", tmp_path / "data", "--json").stdout)) == 1


def test_commands_send_the_key_of_a_file_or_of_the_environment(locked, make_key, fedcompute, tmp_path):
    viewer = make_key(locked.data_dir, "viewer")
    env = {"FEDCOMPUTE_API_KEY": viewer}
    (tmp_path / "key").write_text(f"{viewer}\n")
    there = ["--server", locked.url]
    task_list = ["task", "list", *there, "--population", "p", "--json"]
    refused = fedcompute(*task_list)
    assert refused.exit_code == 1
    assert "api_key_missing" in refused.stderr
    assert "fedcompute api-key create" in refused.stderr
    assert fedcompute(*task_list, "--api-key-file", tmp_path / "key").stdout.strip() == "[]"
    assert fedcompute(*task_list, env=env).stdout.strip() == "[]"
    assert fedcompute("privacy", "ledger", "--population", "p", *there, env=env).exit_code == 0
    weak = fedcompute("task", "cancel", "--population", "p", "--task-id", 1, *there, env=env)
    assert "role_insufficient" in weak.stderr
    for wrong in ("no key at all", "fc_é", f"{viewer}\nx-more: 1"):
        broken = fedcompute(*task_list, env={"FEDCOMPUTE_API_KEY": wrong})
        assert broken.exit_code == 1
        assert isinstance(broken.exception, SystemExit)
        assert wrong not in broken.stderr
        assert viewer not in broken.stderr
    missing = fedcompute(*task_list, "--api-key-file", tmp_path / "nothing")
    assert missing.exit_code == 1
    assert "cannot be read" in missing.stderr


def test_a_revoked_key_opens_nothing_from_then_on(locked, make_key, fedcompute):
    env = {"FEDCOMPUTE_API_KEY": make_key(locked.data_dir, "operator")}
    task_list = ["task", "list", "--server", locked.url, "--json"]
    assert fedcompute(*task_list, env=env).exit_code == 0
    revoke = ["api-key", "revoke", env["FEDCOMPUTE_API_KEY"].split("_")[1], "--data-dir", locked.data_dir]
    assert fedcompute(*revoke).exit_code == 0
    assert "was revoked" in fedcompute(*task_list, env=env).stderr
    assert fedcompute(*revoke).exit_code == 1


def test_what_is_done_at_the_prompt_is_in_the_audit_log_too(locked, make_key, fedcompute):
    key = make_key(locked.data_dir, "operator")
    env = {"FEDCOMPUTE_API_KEY": key}
    log = ["audit", "log", "--server", locked.url]
    acts = json.loads(fedcompute(*log, "--json", env=env).stdout)
    (act,) = (act for act in acts if act["subject"] == f"{key.split('_')[1]} (the operator) operator")
    assert act["actor"].startswith("prompt (")
    assert (act["action"], act["status"]) == ("api_key.create", 200)
    stored = fedcompute("audit", "log", "--data-dir", locked.data_dir, "--json").stdout
    assert json.loads(stored) == acts
    told = fedcompute(*log, env=env).stdout
    assert "api_key.create" in told
    assert key not in told


def test_a_task_is_built_shown_and_cloned_with_keys(locked, make_key, fedcompute, build, model, tmp_path):
    builder = {"FEDCOMPUTE_API_KEY": make_key(locked.data_dir, "builder")}
    operator = {"FEDCOMPUTE_API_KEY": make_key(locked.data_dir, "operator")}
    at = ["--server", locked.url, "--json"]
    arguments = ["--model", model.saved, "--config", model.config, *at]
    refused = build(*arguments)
    assert refused.exit_code == 1
    assert "401" in refused.stderr
    result = build(*arguments, env=builder)
    assert result.exit_code == 0, result.stderr
    task = ["--population", "digits", "--task-id", json.loads(result.stdout)["tasks"][0]["task_id"]]
    deadline = time.monotonic() + 60
    status = ""
    while status != "OPEN" and time.monotonic() < deadline:
        time.sleep(0.05)
        found = fedcompute("task", "progress", *task, *at, env=builder)
        status = json.loads(found.stdout)["status"]
    assert status == "OPEN"
    told = fedcompute("task", "progress", *task, *at[:2], env=builder).stdout
    assert "0 of 3 rounds released" in told
    artifacts = json.loads(fedcompute("task", "artifacts", *task, *at, env=builder).stdout)
    assert [one["name"] for one in artifacts] == ["plan", "client-plan", "checkpoint", "client-checkpoint"]
    assert "role_insufficient" in fedcompute("task", "cancel", *task, *at, env=builder).stderr
    assert fedcompute("task", "cancel", *task, *at, env=operator).exit_code == 0
    cloned = fedcompute("task", "clone", *task, *at, env=builder)
    assert cloned.exit_code == 0, cloned.stderr
    assert json.loads(cloned.stdout)["task_id"] == 3
    export = ["--iteration", 0, "--model", model.keras, "--out", tmp_path / "out.keras"]
    exported = fedcompute("model", "export", *task, *at, *export, env=operator)
    assert exported.exit_code == 0, exported.stderr


def test_the_published_client_builds_through_a_builder_that_asks_whose_key_it_is(
    locked, make_key, start, program, fedcompute, model
):
    viewer, builder = make_key(locked.data_dir, "viewer"), make_key(locked.data_dir, "builder")
    process = start("task_builder", "--port=0", f"--task_management_server={locked.url}", "--require_api_keys")
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
    operator = {"FEDCOMPUTE_API_KEY": make_key(locked.data_dir, "operator")}
    log = json.loads(fedcompute("audit", "log", "--server", locked.url, "--json", env=operator).stdout)
    actor = f"{builder.split('_')[1]} (the builder)"
    created = [act["subject"] for act in log if act["action"] == "task.create" and act["actor"] == actor]
    assert sorted(created) == ["env/1", "env/2", "flag/1", "flag/2"]


def test_a_server_that_wants_keys_says_how_to_make_one(start, tmp_path):
    process = start("fedcompute", "server", "--data-dir", tmp_path / "data", "--host", "0.0.0.0", "--port", 0)
    text = "".join(process.stdout.readline() for _ in range(8))
    assert "operators need  an API key" in text
    assert f"fedcompute api-key create --role operator --label NAME --data-dir {tmp_path / 'data'}" in text
    process.send_signal(signal.SIGINT)
    assert "there is no API key, so nobody can manage tasks" in process.communicate(timeout=60)[1]


def test_a_key_that_would_be_sent_in_plain_text_over_a_network_is_remarked_on(fedcompute):
    arguments = ["task", "list", "--server", "http://server.invalid:8080"]
    result = fedcompute(*arguments, env={"FEDCOMPUTE_API_KEY": "fc_0f0f0f0f0f0f_" + "A" * 43})
    assert "the API key travels to server.invalid unencrypted" in result.stderr
    assert "AAAA" not in result.stderr
