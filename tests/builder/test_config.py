import pytest

from fedcompute.builder.config import MAX_CONFIG_BYTES, read_config
from fedcompute.errors import ConfigInvalid, Reason
from fedcompute.protos import task_builder_pb2


def refusal(text: str) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        read_config(text.encode())
    assert caught.value.reason == Reason.CONFIG_UNREADABLE
    return caught.value.detail


def test_the_reference_configurations_parse(reference):
    for name in ("keras_task_config.pbtxt", "keras_task_config_build_artifact_only.pbtxt"):
        config = read_config((reference / "input" / name).read_bytes())
        assert config.population_name == "keras_example_int64_task_builder"
        assert config.policies.model_release_policy.num_max_training_rounds == 1000


def test_an_unknown_field_is_named_with_its_line_and_the_nearest_name():
    detail = refusal("mode: TRAINING_ONLY\nfederated_learning {\n  learning_process { sever_learning_rate: 1 }\n}")
    assert detail.startswith("line 3, column 22: unknown field 'sever_learning_rate'")
    assert "server_learning_rate" in detail


def test_an_unknown_enum_value_is_named_with_its_field():
    detail = refusal("federated_learning {\n learning_process {\n  type: FED_SDG\n } }")
    assert detail.startswith("line 3, column 9: field 'type' has no value 'FED_SDG'")
    assert "FED_SGD" in detail


def test_a_value_without_resemblance_is_answered_with_all_values():
    assert "TRAINING_ONLY, TRAINING_AND_EVAL, EVAL_ONLY" in refusal("mode: QQQ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mode: TRAINING_ONLY\nmode: EVAL_ONLY", ["line 2", "mode", "multiple"]),
        ("differential_privacy { clip_norm: 0,1 }", ["line 1", "clip_norm", "dot"]),
        ("\ndifferential_privacy { clip_norm: much }", ["line 2", "clip_norm", "much"]),
        ("population_name: 3", ["line 1", "population_name"]),
        ("policies {\n", ["line 1", "policies"]),
        ("population_name: “a”", ["line 1, column 18", "LEFT DOUBLE QUOTATION MARK"]),
        ("mode:\u00a0EVAL_ONLY", ["line 1, column 6", "NO-BREAK SPACE"]),
        ("mode: TRAINING_ONLY }", ["line 1", "}"]),
        ('{"moode": 1}', ["moode"]),
    ],
)
def test_a_slip_is_refused_with_its_place(text, words):
    detail = refusal(text)
    assert all(word in detail for word in words), detail


def test_byte_order_marks_carriage_returns_tabs_and_comments_are_harmless():
    text = "\ufeff# “quoted”, 0,1\r\n\tmode: EVAL_ONLY # 0,5\r\n  population_name: 'é # no comment'\r\n"
    config = read_config(text.encode())
    assert config.mode == task_builder_pb2.TaskMode.EVAL_ONLY
    assert config.population_name == "é # no comment"


def test_json_is_recognised_by_its_content():
    config = read_config(b' {"mode": "EVAL_ONLY", "populationName": "a", "label_name": "b"}')
    assert (config.mode, config.population_name, config.label_name) == (3, "a", "b")


def test_what_is_no_text_or_too_long_is_refused():
    with pytest.raises(ConfigInvalid, match="line 2"):
        read_config(b"mode: EVAL_ONLY\n\xff\xfe")
    with pytest.raises(ConfigInvalid, match=str(MAX_CONFIG_BYTES)):
        read_config(b"#" * (MAX_CONFIG_BYTES + 1))
