"""The configurations of the published tutorial, pasted as they are printed there."""

import re
from pathlib import Path

import pytest

from fedcompute.builder.config import read_config
from fedcompute.builder.differential_privacy import account, check_dp
from fedcompute.builder.problem import ConfigProblems
from fedcompute.builder.validation import validate
from fedcompute.protos import task_builder_pb2

SEED = Path(__file__).resolve().parents[2] / "../shared/seed"
Flags = task_builder_pb2.ExperimentFlags


@pytest.fixture(scope="module")
def page() -> str:
    files = sorted(SEED.glob("*.txt")) if SEED.is_dir() else []
    if not files:
        pytest.skip("the published tutorial is not beside this checkout")
    return files[0].read_text()


def test_the_job_page_s_configuration_warns_of_its_misspelling_and_is_not_private_enough(page):
    start = page.index("  # Identifies the set")
    loaded = read_config(page[start : page.index("Langkah 4", start)].encode())
    (warning,) = loaded.warnings
    assert re.fullmatch(r"config line \d+: 'sever_learning_rate' read as 'server_learning_rate'", warning)
    assert loaded.config.federated_learning.learning_process.server_learning_rate == 1
    settings = validate(loaded.config, Flags())
    assert settings.mode == task_builder_pb2.TaskMode.TRAINING_AND_EVAL
    assert settings.warnings == ()
    accounting = account(settings)
    assert accounting.parameters.epsilon > 500
    with pytest.raises(ConfigProblems) as caught:
        check_dp(accounting)
    (problem,) = caught.value.problems
    assert "not private enough to pass DP accounting check" in problem.message
    assert "the target is 10" in problem.rule
    assert float(re.search(r"noise_multiplier to (\S+)", problem.remedy)[1]) == pytest.approx(0.4207)


def test_the_image_tutorial_s_privacy_settings_are_within_their_limits(page):
    start = page.index("policies {", page.index("dp_target_epsilon: 10") - 300)
    fragment = page[start : page.index("Langkah 3", start)]
    text = (
        'mode: TRAINING_ONLY population_name: "mnist_cnn_task" '
        f"federated_learning {{ learning_process {{ runtime_config {{ report_goal: 2 }} }} }}\n{fragment}"
    )
    settings = validate(read_config(text.encode()).config, Flags())
    assert settings.warnings == ()
    assert settings.config.policies.model_release_policy.dp_delta == 1e-6


def test_the_published_fragments_are_read(page):
    metrics = page[page.index("federated_learning {\n      learning_process {\n        metrics") :]
    metrics = metrics[: metrics.index("Jika metrik")]
    names = [m.name for m in read_config(metrics.encode()).config.federated_learning.learning_process.metrics]
    assert names == ["binary_accuracy", "binary_crossentropy", "recall", "precision", "auc-roc", "auc-pr"]
    start = page.index("mode: TRAINING_AND_EVAL  # Task execution mode")
    config = read_config(page[start : page.index("•", start)].encode()).config
    assert (config.population_name, config.label_name) == ("my_example_model", "my_label")
