"""`fedcompute task` and `fedcompute model` against a real server: built, listed, shown, exported, canceled."""

import json
import shutil
import time

import numpy as np
import pytest

TASK = ["--population", "digits", "--task-id", 1]


@pytest.fixture(scope="module")
def built(program, server, model):
    """The tasks that `fedcompute task build --json` made on the module's server."""
    arguments = ["--model", model.saved, "--config", model.config, "--server", server.url, "--json"]
    result = program("fedcompute", "task", "build", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture
def opened(built, fedcompute, server):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        view = json.loads(fedcompute("task", "show", *TASK, "--server", server.url, "--json").output)
        if view["task"]["status"] == "OPEN" and view["iterations"]:
            return view
        time.sleep(0.1)
    raise AssertionError("the task did not open")


def test_a_build_registers_both_tasks_and_reports_what_it_applied(built):
    assert [(task["task_id"], task["kind"]) for task in built["tasks"]] == [(1, "TRAINING"), (2, "EVALUATION")]
    assert built["report"]["applied_algorithms"]["dp_aggregator"] == "FIXED_GAUSSIAN"
    assert built["report"]["metric_results"]["accepted_metrics"] == "sparse_categorical_accuracy"


def test_nothing_that_a_build_prints_is_signed(built):
    assert "http" not in json.dumps(built)


def test_the_list_and_the_view_show_the_open_task(opened, fedcompute, server):
    listed = fedcompute("task", "list", "--server", server.url).output.splitlines()
    assert listed[1].split()[:8] == ["digits", "1", "training", "open", "1", "of", "3", "2"]
    shown = fedcompute("task", "show", *TASK, "--server", server.url).output
    assert "digits/1" in shown
    assert "collecting" in shown
    assert json.loads(fedcompute("task", "list", "--server", server.url, "--json").output)[0]["population"] == "digits"


def test_a_population_without_tasks_lists_as_empty(fedcompute, server):
    assert json.loads(fedcompute("task", "list", "--server", server.url, "--population", "x", "--json").output) == []
    assert "no tasks" in fedcompute("task", "list", "--server", server.url, "--population", "x").output


def test_a_second_build_says_that_the_population_is_taken(opened, build, server, model):
    result = build("--model", model.saved, "--config", model.config, "--server", server.url)
    assert result.exit_code == 1
    assert "active training task 1" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_dry_run_and_another_population_create_nothing_here(opened, build, model, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "model"), "zip", model.saved)
    elsewhere = ["--server", "http://localhost:1", "--population", "other"]
    result = build("--model", archive, "--config", model.config, *elsewhere, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "would be created: population other, 3 rounds of 2 devices" in result.stdout


def test_a_build_takes_its_configuration_from_the_model_s_archive(fedcompute, build, model, tmp_path):
    shutil.copytree(model.saved, tmp_path / "bundle" / "saved_model")
    shutil.copy(model.config, tmp_path / "bundle")
    archive = shutil.make_archive(str(tmp_path / "bundle"), "zip", tmp_path / "bundle")
    assert "is valid: TRAINING_AND_EVAL for population digits" in fedcompute("task", "validate", archive).stdout
    result = build("--model", archive, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "would be created: population digits" in result.stdout
    without = build("--model", model.saved, "--dry-run")
    assert without.exit_code == 1
    assert "no task configuration is given" in without.stderr


def test_a_released_checkpoint_comes_back_into_a_keras_file(opened, fedcompute, server, model, tmp_path):
    import keras

    changed = keras.models.load_model(model.keras, compile=False)
    changed.set_weights([np.zeros_like(weight) for weight in changed.get_weights()])
    changed.save(tmp_path / "changed.keras")
    out = tmp_path / "out" / "trained.keras"
    arguments = ["model", "export", *TASK, "--server", server.url, "--model", tmp_path / "changed.keras", "--out", out]
    result = fedcompute(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.output) == {"iteration": 0, "parameters": 1970, "out": str(out)}
    for weight, trained in zip(model.weights, keras.models.load_model(out, compile=False).get_weights(), strict=True):
        np.testing.assert_array_equal(weight, trained)
    again = fedcompute(*arguments)
    assert again.exit_code == 1
    assert "exists" in again.stderr
    assert fedcompute(*arguments, "--force").exit_code == 0


def test_a_released_checkpoint_comes_back_into_a_saved_model(opened, fedcompute, server, model, tmp_path):
    from fedcompute.models.saved_model import load_functional_model

    out = tmp_path / "trained"
    result = fedcompute(
        "model", "export", *TASK, "--iteration", 0, "--server", server.url, "--model", model.saved, "--out", out
    )
    assert result.exit_code == 0, result.stderr
    for weight, trained in zip(model.weights, load_functional_model(out).trainable, strict=True):
        np.testing.assert_array_equal(weight, trained)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--iteration": 9}, "round 9"),
        ({"--iteration": "newest"}, "--iteration"),
        ({"--task-id": 2}, "evaluates"),
        ({"--task-id": 7}, "no task digits/7"),
        ({"--model": "missing.keras"}, "missing.keras"),
        ({"--out": "directory"}, "cannot take a copy"),
    ],
)
def test_an_export_that_cannot_work_writes_nothing(opened, fedcompute, server, model, tmp_path, changes, words):
    options = {"--population": "digits", "--server": server.url, "--model": model.keras, "--out": "out.keras"} | changes
    options["--out"] = tmp_path / options["--out"]
    result = fedcompute("model", "export", *(part for option in options.items() for part in option))
    assert result.exit_code == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_shape_or_a_damaged_file_is_refused(opened, fedcompute, server, tmp_path):
    import keras

    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(tmp_path / "other.keras")
    (tmp_path / "damaged.keras").write_bytes(b"PK\x03\x04 nothing")
    for name, code in (("other", "state_mismatch"), ("damaged", "saved_model_invalid")):
        arguments = ["--model", tmp_path / f"{name}.keras", "--out", tmp_path / "out.keras"]
        result = fedcompute("model", "export", *TASK, "--server", server.url, *arguments)
        assert result.exit_code == 1
        assert code in result.stderr
    assert not (tmp_path / "out.keras").exists()


def test_nothing_is_spent_before_the_first_round(opened, fedcompute, server):
    assert "Nothing is spent" in fedcompute("privacy", "report", *TASK, "--server", server.url).output


def test_a_server_s_metrics_that_do_not_exist_yet_are_a_typed_error(opened, fedcompute, server):
    result = fedcompute("metrics", "table", server.url, "--population", "digits")
    assert result.exit_code == 1
    assert "no metrics of population 'digits'" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("population_name: 'x'\nfederated_lerning {}", "line 2"),
        ("population_name: 'x'", "report_goal"),
    ],
)
def test_a_config_that_is_wrong_names_the_place_before_any_build(build, model, tmp_path, text, words):
    config = tmp_path / "config.pbtxt"
    config.write_text(text)
    result = build("--model", model.saved, "--config", config, "--dry-run")
    assert result.exit_code == 1
    assert words in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_model_that_is_none_is_refused(build, model, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        result = build("--model", tmp_path / name, "--config", model.config, "--dry-run")
        assert result.exit_code == 1
        assert "saved_model_invalid" in result.stderr


def test_a_task_is_paused_shown_so_and_resumed_and_twice_is_a_refusal(opened, fedcompute, server):
    there = ["--server", server.url]
    paused = fedcompute("task", "pause", *TASK, *there, "--json")
    assert json.loads(paused.output) == {"population": "digits", "task_id": 1, "status": "PAUSED"}
    again = fedcompute("task", "pause", *TASK, *there)
    assert again.exit_code == 1
    assert "task_conflict" in again.stderr
    assert "is PAUSED and stays so" in again.stderr
    assert fedcompute("task", "list", *there).output.splitlines()[1].split()[3] == "paused"
    assert "paused" in fedcompute("task", "show", *TASK, *there).output
    assert fedcompute("task", "resume", *TASK, *there).output == "task digits/1 is open\n"
    assert fedcompute("task", "resume", *TASK, *there, "--json").exit_code == 1
    assert fedcompute("task", "list", *there).output.splitlines()[1].split()[3] == "open"


# Last: it ends the task that the tests above look at.
def test_a_canceled_task_stays_canceled_and_ends_a_watch_with_code_1(opened, fedcompute, server):
    first = fedcompute("task", "cancel", *TASK, "--server", server.url, "--json")
    assert json.loads(first.output)["status"] == "CANCELED"
    watched = fedcompute("task", "watch", *TASK, "--server", server.url, "--json")
    assert watched.exit_code == 1
    assert json.loads(watched.stdout)["status"] == "CANCELED"
    assert "task_ended" in watched.stderr
    people = fedcompute("task", "watch", *TASK, "--server", server.url)
    assert people.exit_code == 1
    assert people.stdout.endswith("\n")
