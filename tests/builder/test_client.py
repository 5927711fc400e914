import zipfile

import pytest

from fedcompute.builder.client import SUCCESS, build_request, load_config, render, send
from fedcompute.errors import ArtifactInvalid, BuildFailed, ConfigInvalid, Reason
from fedcompute.protos import task_builder_pb2

Flags = task_builder_pb2.ExperimentFlags


def test_a_configuration_is_read_by_path_and_by_uri(tmp_path):
    path = tmp_path / "fcp_server_config.json"
    path.write_text('# text format, whatever the name\n  population_name: "a"\n')
    assert load_config(str(path)).config.population_name == "a"
    assert load_config(path.as_uri(), population_name="b").config.population_name == "b"


def test_a_configuration_that_cannot_be_loaded_is_reported_in_the_published_words(tmp_path):
    path = tmp_path / "config"
    path.write_text("modee: 1")
    with pytest.raises(ConfigInvalid) as caught:
        load_config(str(path))
    assert caught.value.detail.startswith(f"Cannot load task config from {path}. line 1, column 1: unknown field")
    with pytest.raises(ConfigInvalid, match="Cannot load task config from nowhere"):
        load_config("nowhere")


def test_a_configuration_is_read_from_the_archive_that_holds_the_model(tmp_path):
    bundle = tmp_path / "bundle.zip"
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("model/saved_model.pb", b"graph")
        archive.writestr("config.json", 'population_name: "a" differential_privacy { type: TREE }')
    loaded = load_config(str(bundle))
    assert loaded.config.population_name == "a"
    assert loaded.warnings == ("config line 1: 'TREE' read as 'TREE_AGGREGATION'",)
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.writestr("other.pbtxt", "")
    with pytest.raises(ConfigInvalid, match=r"Cannot load task config from .* must hold one task configuration"):
        load_config(str(bundle))


def test_a_local_model_travels_inline_and_a_uri_is_passed_on(tmp_path, config):
    (tmp_path / "saved_model.pb").write_bytes(b"graph")
    inline = build_request(str(tmp_path), config, Flags(skip_dp_check=True))
    assert inline.saved_model.inline_resource.data.startswith(b"PK")
    assert inline.flags.skip_dp_check
    archive = tmp_path / "model.zip"
    archive.write_bytes(inline.saved_model.inline_resource.data)
    assert build_request(str(archive), config, Flags()).saved_model == inline.saved_model
    assert build_request("gs://bucket/model", config, Flags()).saved_model.uri == "gs://bucket/model"
    with pytest.raises(ArtifactInvalid, match="no saved model at"):
        build_request(str(tmp_path / "missing"), config, Flags())


def test_a_success_is_shown_as_line_report_and_tasks():
    response = task_builder_pb2.BuildTaskResponse()
    response.task_report.applied_algorithms.learning_algo = 1
    response.task_group.training_task.min_client_version = "341912000"
    shown = render(response)
    assert shown.success
    assert shown.records[0] == SUCCESS
    assert shown.records[1] == "applied_algorithms {\n  learning_algo: FED_AVG\n}\n"
    assert shown.records[2] == 'training_task {\n  min_client_version: "341912000"\n}\n'


def test_a_failure_is_shown_as_report_and_line():
    response = task_builder_pb2.BuildTaskResponse()
    response.error_info.error_type = 1
    response.error_info.error_message = "Task config is invalid: ..."
    shown = render(response)
    assert not shown.success
    assert shown.records[1] == (
        "Failed to create task group. Error type: 1; Error message: Task config is invalid: ... [INVALID_REQUEST]"
    )


def test_a_key_appears_in_no_error(caplog):
    with caplog.at_level("INFO"), pytest.raises(BuildFailed) as caught:
        send(task_builder_pb2.BuildTaskRequest(), "http://localhost:9/", api_key="secret-key")
    assert caught.value.reason == Reason.SERVER_UNREACHABLE
    assert caught.value.detail == "Fail to connect: http://localhost:9/taskbuilder/v1:build-task-group"
    assert "secret-key" not in caplog.text
    assert caught.value.__cause__ is None
