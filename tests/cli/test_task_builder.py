"""The two programs of the published tutorial."""

import json
import re
import shutil
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

CLIENT = "task_builder_client"
LOG_LINE = re.compile(r"^I\d{4} \d{2}:\d{2}:\d{2}\.\d{6} +\d+ \w+\.py:\d+\] (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def builder(start_once, server):
    """The base URL of a task builder that registers with the module's server."""
    process = start_once("task_builder", "--port=0", env={"TASK_MANAGEMENT_SERVER_URL": server.url})
    url = process.stdout.readline().split()[-1]
    assert server.url in process.stdout.readline()
    return url


def test_the_client_builds_both_tasks_and_prints_the_published_records(program, builder, model):
    result = program(
        CLIENT, f"--task_builder_server={builder}", f"--saved_model={model.saved}", f"--task_config={model.config}"
    )
    assert result.returncode == 0, result.stderr
    messages = LOG_LINE.findall(result.stderr)
    assert messages == [
        "Creating build task request from command-line options.",
        f"Loading task config from {model.config}...",
        f"Send HTTP request to: {builder}/taskbuilder/v1:build-task-group",
        "Success! Tasks are built, and artifacts are uploaded to the cloud.",
        "applied_algorithms {",
        "training_task {",
    ]
    assert 'accepted_metrics: "sparse_categorical_accuracy"' in result.stderr
    assert 'min_client_version: "' in result.stderr.partition("eval_task {")[2]
    assert "?" not in result.stderr, "a signed URL"


def test_a_refused_config_prints_the_report_then_the_failure_and_exits_1(program, builder, model):
    arguments = ["-saved_model", model.saved, "--task_config", model.config, "--population_name", "weak"]
    weak = model.config.with_name("weak.pbtxt")
    weak.write_text(model.config.read_text().replace("noise_multiplier: 5", "noise_multiplier: 0.1"))
    arguments[3] = weak
    result = program(CLIENT, "--task_builder_server", f"{builder}/", *arguments)
    assert result.returncode == 1
    report, failure = result.stderr.find("dp_hyperparameters {"), result.stderr.find("Failed to create task group.")
    assert 0 <= report < failure
    assert "Error type: 1; Error message: Task config is invalid: [Invalid task config]: " in result.stderr


def test_one_archive_of_model_and_config_is_enough_and_a_published_misspelling_is_in_the_report(
    program, builder, model, tmp_path
):
    (tmp_path / "fcp_server_config.json").write_text(
        model.config.read_text().replace("client_learning_rate", "sever_learning_rate: 1 client_learning_rate")
    )
    shutil.copytree(model.saved, tmp_path / "bundle" / "saved_model")
    shutil.move(tmp_path / "fcp_server_config.json", tmp_path / "bundle")
    archive = shutil.make_archive(str(tmp_path / "bundle"), "zip", tmp_path / "bundle")
    result = program(CLIENT, f"--task_builder_server={builder}", f"--saved_model={archive}", "--population_name=zipped")
    assert result.returncode == 0, result.stderr
    warning = "config line 6: 'sever_learning_rate' read as 'server_learning_rate'"
    assert re.search(rf"^W.*\] {warning}$", result.stderr, re.MULTILINE)
    assert f'warnings: "{warning}"'.replace("'", "\\'") in result.stderr
    assert 'population_name: "zipped"' in result.stderr


def test_the_builder_answers_its_health_routes(builder):
    for route in ("/ready", "/healthz"):
        with urllib.request.urlopen(builder + route, timeout=30) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("given", [[], ["--saved_model=x"]])
def test_a_missing_flag_is_named_as_published(program, given):
    result = program(CLIENT, *given)
    name = "task_config" if given else "saved_model"
    assert result.returncode == 1
    assert result.stderr.strip() == f"ValueError: `--{name}` is required but not set."


def test_a_builder_that_is_not_there_is_named_without_the_key(program, model):
    arguments = [f"--saved_model={model.saved}", f"--task_config={model.config}", "--api_key=SECRET"]
    result = program(CLIENT, "--task_builder_server=http://localhost:1", *arguments)
    assert result.returncode == 1
    assert "Fail to connect: http://localhost:1/taskbuilder/v1:build-task-group" in result.stderr
    assert "SECRET" not in result.stderr + result.stdout


def test_a_config_that_is_not_there_is_the_published_sentence(program):
    result = program(CLIENT, "--saved_model=x", "--task_config=missing.json")
    assert result.returncode == 1
    assert "Cannot load task config from missing.json." in result.stderr


def test_flags_come_in_every_published_form(program, tmp_path):
    # Every form is understood if the run gets as far as the missing file.
    for flags in (
        ["--build_artifact_only=true"],
        ["-skip_dp_check=True"],
        ["--skip_flex_ops_check"],
        ["--noskip_dp_check"],
    ):
        result = program(CLIENT, "--saved_model", "x", "-task_config", "missing.json", *flags)
        assert "Cannot load task config" in result.stderr
    for wrong in (["--nosuch=1"], ["--skip_dp_check=maybe"], ["stray"]):
        result = program(CLIENT, *wrong)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", [CLIENT, "task_builder"])
def test_help_has_an_example_and_every_flag(program, name):
    result = program(name, "--help")
    assert result.returncode == 0
    assert "Example: " in result.stdout
    assert ("--impersonate_service_account" if name == CLIENT else "--total_population") in result.stdout


def test_an_api_key_goes_into_the_url_alone_and_is_never_shown(program, model):
    asked = []

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.headers["authorization"]))
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_): ...

    gateway = HTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=gateway.serve_forever, daemon=True).start()
    arguments = [f"--saved_model={model.saved}", f"--task_config={model.config}", "--api_key=SECRET"]
    result = program(CLIENT, f"--task_builder_server=http://127.0.0.1:{gateway.server_port}/", *arguments)
    gateway.shutdown()
    gateway.server_close()
    assert asked == [("/taskbuilder/v1:build-task-group?key=SECRET", None)]
    assert result.returncode == 1
    assert "403" in result.stderr
    assert "SECRET" not in result.stderr + result.stdout


def _artifact_blocks(config, out):
    text = config
    for anchor, prefix in (("learning_process {", ""), ("evaluation {", "eval_")):
        urls = " ".join(
            f'{name}_url: "{out}/{prefix}{file}"'
            for name, file in (("plan", "plan.pb"), ("client_plan", "client_only_plan.pb"), ("checkpoint", "state.ckp"))
        )
        text = text.replace(anchor, f"{anchor} artifact_building {{ {urls} }}", 1)
    return text


def test_artifacts_only_from_the_client_to_files_through_a_service_of_its_own(program, start, model, tmp_path):
    # No task management answers there: none is needed.
    environment = {"TASK_MANAGEMENT_SERVER_URL": "http://localhost:9"}
    process = start("task_builder", "--port=0", f"--storage_root={tmp_path}", env=environment)
    url = process.stdout.readline().split()[-1]
    arguments = [f"--task_builder_server={url}", f"--saved_model={model.saved}", "--build_artifact_only=true"]
    config = tmp_path / "config.pbtxt"
    config.write_text(_artifact_blocks(model.config.read_text(), tmp_path / "out"))
    result = program(CLIENT, *arguments, f"--task_config={config}")
    assert result.returncode == 0, result.stderr
    assert "Success! Tasks are built, and artifacts are uploaded to the cloud." in result.stderr
    assert f'server_phase_url: "{tmp_path}/out/eval_plan.pb"' in result.stderr
    names = {"plan.pb", "client_only_plan.pb", "state.ckp"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {f"eval_{name}" for name in names}
    for broken, text in (
        (_artifact_blocks(model.config.read_text(), "{storage_path}"), "Replace the placeholder in braces"),
        (_artifact_blocks(model.config.read_text(), "/etc"), "only below its storage root"),
        (model.config.read_text(), "invalid URLs: empty URI."),
    ):
        config.write_text(broken)
        refused = program(CLIENT, *arguments, f"--task_config={config}")
        assert refused.returncode == 1
        assert text in refused.stderr


def test_an_impersonation_that_fails_is_an_error_rather_than_a_request_without_identity(program, model, tmp_path):
    arguments = [f"--saved_model={model.saved}", f"--task_config={model.config}", "--impersonate_service_account=a@b.c"]
    environment = {"GCE_METADATA_HOST": "127.0.0.1:9", "HOME": str(tmp_path), "GOOGLE_APPLICATION_CREDENTIALS": ""}
    result = program(CLIENT, "--task_builder_server=http://localhost:1", *arguments, env=environment)
    assert result.returncode == 1
    assert "--impersonate_service_account: no application default credentials" in result.stderr
    assert "Send HTTP request" not in result.stderr


def test_a_builder_on_a_port_in_use_is_a_block(program):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = program("task_builder", f"--port={taken.getsockname()[1]}")
    assert result.returncode == 1
    assert "cannot listen" in result.stderr
    assert "Traceback" not in result.stderr


def test_forbidden_skip_flags_are_refused_by_the_builder(program, start, server, model):
    process = start("task_builder", "--port=0", "--noallow_skip_dp_check", f"--task_management_server={server.url}")
    url = process.stdout.readline().split()[-1]
    arguments = [f"--saved_model={model.saved}", f"--task_config={model.config}", "--skip_dp_check"]
    result = program(CLIENT, f"--task_builder_server={url}", *arguments)
    assert result.returncode == 1
    assert "does not allow the flag skip_dp_check" in result.stderr


def test_the_tasks_that_the_client_made_are_on_the_server(fedcompute, server):
    tasks = json.loads(fedcompute("task", "list", "--server", server.url, "--population", "digits", "--json").output)
    assert [(task["population"], task["kind"]) for task in tasks] == [("digits", "TRAINING"), ("digits", "EVALUATION")]
