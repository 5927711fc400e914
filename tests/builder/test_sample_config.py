import re

import pytest

from fedcompute.builder.config import read_config
from fedcompute.builder.differential_privacy import account, check_dp
from fedcompute.builder.sample_config import sample_config
from fedcompute.builder.validation import validate
from fedcompute.protos import task_builder_pb2

Mode = task_builder_pb2.TaskMode
NO_FLAGS = task_builder_pb2.ExperimentFlags()
# Set by the server while it assigns.
NOT_FOR_USERS = {"current_index", "parameter"}


def field_names(descriptor=task_builder_pb2.TaskConfig.DESCRIPTOR):
    for name, field in descriptor.fields_by_name.items():
        yield name
        if field.message_type is not None:
            yield from field_names(field.message_type)


@pytest.mark.parametrize("mode", [Mode.TRAINING_ONLY, Mode.TRAINING_AND_EVAL, Mode.EVAL_ONLY])
def test_the_sample_is_valid_and_private_in_every_mode(mode):
    loaded = read_config(sample_config(mode).encode())
    settings = validate(loaded.config, NO_FLAGS)
    assert (settings.mode, settings.warnings, loaded.warnings) == (mode, (), ())
    check_dp(account(settings))


def test_the_sample_names_every_field():
    text = sample_config()
    missing = {name for name in field_names() if not re.search(rf"\b{name}\b", text)}
    assert missing == NOT_FOR_USERS


def test_the_sample_stays_valid_with_its_comments_taken_off():
    text = re.sub(r"^(\s*)# ([a-z_]+( \{.*\}|: \S+))$", r"\1\2", sample_config(), flags=re.MULTILINE)
    text = re.sub(r'((plan|client_plan|checkpoint)_url: )""', r'\1"/tmp/a"', text)
    config = read_config(text.encode()).config
    assert config.policies.dataset_policy.batch_size == 3
    assert config.federated_learning.evaluation.example_selector_uri
    assert validate(config, NO_FLAGS).warnings == ()


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a'b", "a{b}c", "é"])
def test_any_name_survives_the_sample(name):
    config = read_config(sample_config(population=name, label_name=name, rounds=7, report_goal=3).encode()).config
    assert (config.population_name, config.label_name) == (name, name)
    assert config.policies.model_release_policy.num_max_training_rounds == 7
    assert config.federated_learning.learning_process.runtime_config.report_goal == 3
