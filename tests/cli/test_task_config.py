import json

import pytest

BROKEN = """\
mode: TRAINING_ONLY
population_name: "digits"
policies { model_release_policy { num_max_training_rounds: 10 } }
federated_learning {
  learning_process {
    type: FED_SDG
    client_learning_rate: 1.5
    runtime_config { report_goal: 0 }
  }
}
differential_privacy { clip_norm: 1 noise_multiplier: 1 }
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "task_config.pbtxt"


@pytest.mark.parametrize("mode", ["training_only", "TRAINING_AND_EVAL", "eval_only"])
def test_what_init_writes_passes_validation(fedcompute, file, mode):
    written = fedcompute("task", "init", file, "--mode", mode, "--population", "digits", "--label-name", "digit")
    assert written.exit_code == 0
    assert f"fedcompute task validate {file}" in written.stdout
    checked = fedcompute("task", "validate", file)
    assert checked.exit_code == 0, checked.output
    assert f"is valid: {mode.upper()} for population digits, 1000 rounds, epsilon" in checked.stdout


def test_init_overwrites_nothing(fedcompute, file):
    file.write_text("mine")
    result = fedcompute("task", "init", file)
    assert result.exit_code == 1
    assert "exists and is left as it is" in result.stderr
    assert file.read_text() == "mine"


def test_validate_shows_every_problem_with_place_value_rule_and_remedy(fedcompute, file):
    file.write_text(BROKEN)
    result = fedcompute("task", "validate", file)
    assert result.exit_code == 1
    assert result.stdout == (
        "note: config line 6: 'FED_SDG' read as 'FED_SGD'\n"
        f"{file}:7: federated_learning.learning_process.client_learning_rate\n"
        "  value:  1.5\n"
        "  rule:   client_learning_rate must be a probability.\n"
        "  remedy: set a number from 0 to 1, or leave it out for the default\n"
        f"{file}:8: federated_learning.learning_process.runtime_config.report_goal\n"
        "  value:  0\n"
        "  rule:   report_goal is required and must be set to an integer strictly greater than zero.\n"
        "  remedy: set the number of devices whose updates make one round\n"
        f"{file} has 2 problems\n"
    )


def test_validate_says_it_in_json_too(fedcompute, file):
    file.write_text(BROKEN)
    result = fedcompute("task", "validate", file, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["valid"] is False
    assert document["warnings"] == ["config line 6: 'FED_SDG' read as 'FED_SGD'"]
    first, second = document["problems"]
    assert first == {
        "path": "federated_learning.learning_process.client_learning_rate",
        "line": 7,
        "value": "1.5",
        "rule": "client_learning_rate must be a probability.",
        "remedy": "set a number from 0 to 1, or leave it out for the default",
        "message": "[Invalid task config]: key `client_learning_rate` has a bad value: `1.5` in `learning_process`. "
        "client_learning_rate must be a probability.",
    }
    assert second["line"] == 8
    file.write_text(BROKEN.replace("1.5", "0.5").replace("report_goal: 0", "report_goal: 50"))
    document = json.loads(fedcompute("task", "validate", file, "--json").stdout)
    assert (document["valid"], document["mode"], document["problems"]) == (True, "TRAINING_ONLY", [])
    assert document["differential_privacy"]["epsilon"] < 10


def test_validate_places_what_cannot_be_read(fedcompute, file):
    file.write_text("mode: EVAL_ONLY\nclip_norm: 1\nuse_daf: maybe\n")
    result = fedcompute("task", "validate", file)
    assert result.exit_code == 1
    assert f"{file}:2: clip_norm\n  rule:   unknown field 'clip_norm'" in result.stdout
    assert f"{file}:3: use_daf\n  value:  maybe\n" in result.stdout


def test_validate_runs_the_privacy_check_unless_told_not_to(fedcompute, file):
    text = BROKEN.replace("1.5", "0.5").replace("report_goal: 0", "report_goal: 50")
    file.write_text(text.replace("clip_norm: 1", "clip_norm: 1 estimated_population: 50"))
    refused = fedcompute("task", "validate", file)
    assert refused.exit_code == 1
    assert f"{file}:11: differential_privacy.noise_multiplier" in refused.stdout
    assert "the target is 10" in refused.stdout
    assert "remedy: set noise_multiplier to" in refused.stdout
    assert fedcompute("task", "validate", file, "--skip-dp-check").exit_code == 0


def test_validate_of_a_missing_file_is_a_readable_error(fedcompute, file):
    result = fedcompute("task", "validate", file)
    assert result.exit_code == 1
    assert f"Cannot load task config from {file}. No such file" in result.stderr
