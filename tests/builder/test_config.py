import json
import math

import pytest
from google.protobuf import json_format, text_format
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedcompute.builder.archive import MAX_CONFIG_BYTES
from fedcompute.builder.config import FIELD_ALIASES, VALUE_ALIASES, read_config
from fedcompute.builder.problem import ConfigProblems
from fedcompute.builder.validation import validate
from fedcompute.errors import FedComputeError, Reason
from fedcompute.protos import task_builder_pb2

TaskConfig = task_builder_pb2.TaskConfig
WRAPPED = {
    "LearningProcess": ("federated_learning {{ learning_process {{\n{}\n}} }}", "federated_learning.learning_process"),
    "DifferentialPrivacy": ("differential_privacy {{\n{}\n}}", "differential_privacy"),
}


def refusal(text: str) -> str:
    with pytest.raises(ConfigProblems) as caught:
        read_config(text.encode())
    assert caught.value.reason == Reason.CONFIG_UNREADABLE
    return caught.value.detail


def at(config, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_the_reference_configurations_parse(reference):
    for name in ("keras_task_config.pbtxt", "keras_task_config_build_artifact_only.pbtxt"):
        config = read_config((reference / "input" / name).read_bytes()).config
        assert config.population_name == "keras_example_int64_task_builder"
        assert config.policies.model_release_policy.num_max_training_rounds == 1000


@pytest.mark.parametrize(
    ("owner", "written", "right"), [(owner, *pair) for owner, pairs in FIELD_ALIASES.items() for pair in pairs.items()]
)
class TestPublishedFieldMisspellings:
    def test_is_read_as_the_right_name_with_one_line_of_warning(self, owner, written, right):
        template, path = WRAPPED[owner]
        loaded = read_config(template.format(f"{written}: 0.5").encode())
        assert getattr(at(loaded.config, path), right) == 0.5
        assert loaded.warnings == (f"config line 2: {written!r} read as {right!r}",)

    def test_beside_the_right_name_with_the_same_value_only_warns(self, owner, written, right):
        template, path = WRAPPED[owner]
        for lines in (f"{written}: 0.50\n{right}: 0.5", f"{right}: 0.5\n{written}: .5"):
            loaded = read_config(template.format(lines).encode())
            assert getattr(at(loaded.config, path), right) == 0.5
            assert len(loaded.warnings) == 1

    def test_beside_the_right_name_with_another_value_is_refused(self, owner, written, right):
        template, _ = WRAPPED[owner]
        for first, second in ((written, right), (right, written)):
            detail = refusal(template.format(f"{first}: 0.5\n{second}: 0.25"))
            assert detail.startswith(f"line 3, column 1: field {second!r} is 0.25, and {first!r} in line 2")
            assert detail.endswith(f"keep {right!r} alone")

    def test_is_refused_at_any_other_place(self, owner, written, right):
        assert f"unknown field {written!r}" in refusal(f"{written}: 0.5")
        assert f"unknown field {written!r}" in refusal(f"policies {{ {written}: 0.5 }}")

    def test_is_read_in_json_too(self, owner, written, right):
        path = WRAPPED[owner][1].split(".")
        first, *rest = written.split("_")
        for name in (written, first + "".join(map(str.capitalize, rest))):
            tree = {name: 0.5}
            for block in reversed(path):
                tree = {block: tree}
            loaded = read_config(json.dumps(tree).encode())
            assert getattr(at(loaded.config, ".".join(path)), right) == 0.5
            assert f"{name!r} read as" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("place", "written", "right"), [(place, *pair) for place, pairs in VALUE_ALIASES.items() for pair in pairs.items()]
)
def test_a_published_value_misspelling_is_read_as_the_right_one_at_its_own_place(place, written, right):
    owner, field = place.split(".")
    template, path = WRAPPED[owner]
    tree = {field: written}
    for block in reversed(path.split(".")):
        tree = {block: tree}
    for text in (template.format(f"{field}: {written}"), json.dumps(tree, indent=0)):
        loaded = read_config(text.encode())
        message = at(loaded.config, path)
        enum = message.DESCRIPTOR.fields_by_name[field].enum_type
        assert getattr(message, field) == enum.values_by_name[right].number
        assert loaded.warnings[0].endswith(f": {written!r} read as {right!r}")
    (other,) = [name for name in WRAPPED if name != owner]
    assert f"field 'type' has no value {written!r}" in refusal(WRAPPED[other][0].format(f"type: {written}"))


def test_an_unknown_field_is_named_with_its_place_and_the_nearest_name():
    detail = refusal("mode: TRAINING_ONLY\nfederated_learning {\n  learning_process { serverlearning_rate: 1 }\n}")
    assert detail.startswith(
        "line 3, column 22: unknown field 'serverlearning_rate' in federated_learning.learning_process; did you mean "
        "server_learning_rate"
    )


def test_a_field_in_the_wrong_block_is_told_where_it_belongs():
    assert "it belongs into differential_privacy" in refusal("clip_norm: 1")
    detail = refusal("federated_learning { learning_process { report_goal: 1 } }")
    assert "it belongs into federated_learning.learning_process.runtime_config or federated_learning.eval" in detail
    assert "it belongs into the top level" in refusal('policies { population_name: "a" }')
    assert "it belongs into differential_privacy" in refusal('{"policies": {"clipNorm": 1}}')


def test_an_unknown_enum_value_is_named_with_its_field_and_the_nearest_value():
    detail = refusal("federated_learning {\n learning_process {\n  type: FED_SGG\n } }")
    assert detail.startswith("line 3, column 9: field 'type' has no value 'FED_SGG'; did you mean FED_SGD")
    assert "TRAINING_ONLY, TRAINING_AND_EVAL, EVAL_ONLY" in refusal("mode: QQQ")
    assert "TRAINING_ONLY, TRAINING_AND_EVAL, EVAL_ONLY" in refusal("mode: 4")


def test_every_wrong_name_and_value_is_listed_in_the_order_of_the_file():
    lines = refusal("modee: EVAL_ONLY\npopulation_name: 3\nuse_daf: maybe\n").split("\n")
    assert [line.split(",")[0] for line in lines] == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mode: TRAINING_ONLY\nmode: TRAINING_ONLY", ["line 2, column 1", "'mode' is given twice", "line 1"]),
        ("policies {}\npolicies {}", ["line 2, column 1", "'policies' is given twice"]),
        ("differential_privacy { clip_norm: 0,1 }", ["line 1, column 36", "'clip_norm'", "with a dot", "use a dot"]),
        ("differential_privacy {\n  clip_norm: 0,1\n  noise_multiplier: 1 }", ["line 2, column 15", "'clip_norm'"]),
        ('{"differential_privacy": {"clip_norm": 0,1}}', ["line 1, column 41", "'clip_norm'", "with a dot"]),
        ('{"differential_privacy": {"clip_norm": "0,1"}}', ["line 1, column 40", "with a dot"]),
        ("\ndifferential_privacy { clip_norm: much }", ["line 2", "clip_norm", "much"]),
        ("differential_privacy { clip_norm: 1_000 }", ["clip_norm", "1_000"]),
        ("differential_privacy { clip_norm: 1.000.000 }", ["clip_norm", "1.000.000"]),
        ('differential_privacy { clip_norm: "1" }', ["clip_norm", "remove the quotes"]),
        ('mode: "EVAL_ONLY"', ["mode", "remove the quotes"]),
        ("population_name: 3", ["line 1, column 18", "population_name", "quotes"]),
        ("population_name: digits", ["population_name", "digits stands without quotes"]),
        ('population_name: "digits', ["line 1, column 18", "does not end", 'close it with "']),
        ("population_name 'digits'", ["line 1, column 17", "expected ':'"]),
        ("population_name:\n", ["line 2, column 1", "a value for 'population_name'"]),
        (r'population_name: "\q"', ["escape"]),
        (r'population_name: "\377"', ["UTF-8"]),
        ("policies {\n", ["line 2", "'policies'", "opened in line 1"]),
        ("policies: 3", ["policies", "{ }"]),
        ("mode { }", ["mode", "takes a value"]),
        ("mode: [EVAL_ONLY]", ["mode", "not a list"]),
        ("use_daf: maybe", ["use_daf", "true or false", "maybe"]),
        ("policies { dataset_policy { batch_size: 1.5 } }", ["batch_size", "whole number", "1.5"]),
        ("policies { dataset_policy { batch_size: 9223372036854775808 } }", ["batch_size", "out of range"]),
        ("policies { data_availability_policy { min_example_count: 2147483648 } }", ["32 bits"]),
        ("policies { dataset_policy { batch_size: 08 } }", ["batch_size", "zero at its front"]),
        ("population_name: “a”", ["line 1, column 18", "LEFT DOUBLE QUOTATION MARK", "retype"]),
        ("\n\tmode:\u00a0EVAL_ONLY", ["line 2, column 7", "NO-BREAK SPACE"]),
        ("mode: EVAL_ONLY\u200b", ["line 1, column 16", "ZERO WIDTH SPACE"]),
        ("mode: EVAL_ONLY \x00", ["line 1, column 17", "U+0000"]),
        ("differential_privacy { clip_norm: \u22121 }", ["MINUS SIGN"]),
        ("mode: TRAINING_ONLY }", ["line 1, column 21", "}"]),
        ("mode: TRAINING_ONLY @", ["line 1, column 21", "'@'"]),
        ('{"moode": 1}', ["line 1, column 2", "moode", "mode"]),
        ('{"mode": "EVAL_ONLY",\n "mode": "EVAL_ONLY"}', ["line 2, column 2", "given twice"]),
        ('{"populationName": "a", "population_name": "a"}', ["given twice"]),
        ('{"mode": EVAL_ONLY}', ["line 1, column 10", "double quotes"]),
        ('{"mode": "EVAL_ONLY"} x', ["after the closing brace"]),
        ('{"mode": "EVAL_ONLY",}', ["line 1, column 22", "field name in double quotes"]),
        ("{'mode': 1}", ["line 1, column 2", "JSON string"]),
        ('{"mode"', ["expected ':'"]),
        ('{"federated_learning": {"learning_process": {"metrics": {"name": "a"}}}}', ["metrics", "brackets"]),
        ("policies " + "{ policies " * 30, ["blocks in each other"]),
        ('{"policies": ' * 30, ["blocks in each other"]),
    ],
)  # fmt: skip
def test_a_slip_is_refused_with_its_place(text, words):
    detail = refusal(text)
    assert all(word in detail for word in words), detail


def test_paste_damage_that_can_be_read_is_read():
    text = "\ufeff# “quoted”, 0,1\r\n\tmode: EVAL_ONLY # 0,5\r\n  population_name: 'é # no comment'\r\n"
    config = read_config(text.encode()).config
    assert config.mode == task_builder_pb2.TaskMode.EVAL_ONLY
    assert config.population_name == "é # no comment"


def test_text_format_is_read_in_all_its_forms():
    config = read_config(
        b"policies: < dataset_policy { batch_size: 0x10; max_training_batches_per_client: -1, } >"
        rb"population_name: 'a\x62' "
        b'"c\\303\\251\\u00e9" label_name: "it\'s" use_daf: t mode: 2'
        b" differential_privacy { clip_norm: 1f noise_multiplier: 2. init_clip_norm: -inf }"
        b" federated_learning { learning_process { metrics: [{ name: 'a' }, < name: 'b' >] metrics { } } }"
    ).config
    assert (config.population_name, config.label_name, config.use_daf, config.mode) == ("abcéé", "it's", True, 2)
    assert config.policies.dataset_policy.batch_size == 16
    assert config.policies.dataset_policy.max_training_batches_per_client == -1
    dp = config.differential_privacy
    assert (dp.clip_norm, dp.noise_multiplier, dp.init_clip_norm) == (1, 2, -math.inf)
    assert [metric.name for metric in config.federated_learning.learning_process.metrics] == ["a", "b", ""]


def test_json_is_recognised_by_its_content_and_may_have_comments():
    config = read_config(
        b'# a comment\n {"mode": "EVAL_ONLY", # another\n "populationName": "a\\u00e9", "label_name": null,'
        b' "policies": {"dataset_policy": {"batchSize": "7", "max_training_batches_per_client": 2e0}},'
        b' "differential_privacy": {"clip_norm": "NaN", "type": 4, "noiseMultiplier": "2.5"}, "use_daf": true}'
    ).config
    assert (config.mode, config.population_name, config.label_name, config.use_daf) == (3, "aé", "", True)
    assert config.policies.dataset_policy.batch_size == 7
    assert config.policies.dataset_policy.max_training_batches_per_client == 2
    assert math.isnan(config.differential_privacy.clip_norm)
    assert (config.differential_privacy.type, config.differential_privacy.noise_multiplier) == (4, 2.5)


def test_the_lines_of_fields_are_known():
    lines = read_config(b"mode: EVAL_ONLY\npolicies {\n dataset_policy { batch_size: 1 }\n}").lines
    assert lines == {
        "mode": 1,
        "policies": 2,
        "policies.dataset_policy": 3,
        "policies.dataset_policy.batch_size": 3,
    }


def test_what_is_no_text_or_too_long_is_refused():
    with pytest.raises(ConfigProblems, match="line 2, column 1"):
        read_config(b"mode: EVAL_ONLY\n\xff\xfe")
    with pytest.raises(ConfigProblems, match=str(MAX_CONFIG_BYTES)):
        read_config(b"#" * (MAX_CONFIG_BYTES + 1))


def messages(descriptor):
    """Random messages of a type: every field absent or anything that the wire can carry."""
    fields = {}
    for name, field in descriptor.fields_by_name.items():
        if field.message_type is not None:
            value = messages(field.message_type)
            value = st.lists(value, max_size=3) if field.is_repeated else value
        elif field.enum_type is not None:
            value = st.sampled_from([entry.number for entry in field.enum_type.values])
        else:
            value = {
                field.TYPE_STRING: st.text(max_size=12),
                field.TYPE_BOOL: st.booleans(),
                field.TYPE_DOUBLE: st.floats(allow_nan=False) | st.sampled_from([0.1, 1e-6, 10.0]),
                field.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
                field.TYPE_INT64: st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 100),
            }[field.type]
        fields[name] = value
    build = descriptor._concrete_class
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: build(**values))


CONFIGS = messages(TaskConfig.DESCRIPTOR)
FORMS = {
    "text format": lambda config: text_format.MessageToString(config),
    "text format on one line": lambda config: text_format.MessageToString(config, as_one_line=True),
    "text format as UTF-8": lambda config: text_format.MessageToString(config, as_utf8=True),
    "JSON": lambda config: json_format.MessageToJson(config),
    "JSON, snake case": lambda config: json_format.MessageToJson(config, preserving_proto_field_name=True),
    "JSON, enums as numbers": lambda config: json_format.MessageToJson(config, use_integers_for_enums=True),
}


@settings(max_examples=200, deadline=None)
@given(config=CONFIGS, form=st.sampled_from(sorted(FORMS)))
def test_every_configuration_survives_every_form(config, form):
    loaded = read_config(FORMS[form](config).encode())
    assert loaded.config == config
    assert loaded.warnings == ()


WORDS = [
    "0,1",
    "1e999",
    "nan",
    "0x",
    "-0",
    "null",
    "mode",
    "metrics",
    "TREE",
    "type: FED_SDG",
    "sever_learning_rate: 1",
]
FRAGMENTS = st.sampled_from([*"{}[]<:,;#\"'\\\n\t -\u00a0“\x00\ud800", *WORDS])


@st.composite
def mutated(draw) -> bytes:
    text = FORMS[draw(st.sampled_from(sorted(FORMS)))](draw(CONFIGS))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 8)))
        text = text[:start] + draw(FRAGMENTS) + text[end:]
    return text.encode(errors="surrogatepass")


@settings(max_examples=200, deadline=None)
@given(data=mutated() | st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode()))
@example(b'{"mode": 1e400}')
@example(b"population_name: '\\ud800'")
@example(b'{"population_name": "\\ud800"}')
@example(b'{"differential_privacy": {"clip_norm": 1e400}}')
def test_whatever_is_read_and_validated_never_ends_in_a_traceback(data):
    try:
        loaded = read_config(data)
        found = validate(loaded.config, task_builder_pb2.ExperimentFlags(skip_dp_check=True))
    except FedComputeError as error:
        assert error.detail
        return
    assert found.report_goal > 0


@settings(max_examples=200, deadline=None)
@given(data=mutated())
def test_text_that_we_accept_without_a_warning_means_the_same_to_the_protobuf_library(data):
    try:
        loaded = read_config(data)
    except FedComputeError:
        return
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    if loaded.warnings or text.lstrip().startswith(("{", "#")):
        return
    assert text_format.Parse(text, TaskConfig()).SerializeToString(deterministic=True) == (
        loaded.config.SerializeToString(deterministic=True)
    )
