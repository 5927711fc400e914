"""The examples of docs/task-builder.md, section 'Configuration'."""

import re
from pathlib import Path

from fedcompute.builder.config import FIELD_ALIASES, VALUE_ALIASES, read_config
from fedcompute.builder.differential_privacy import account, check_dp
from fedcompute.builder.validation import validate
from fedcompute.protos import task_builder_pb2

PAGE = (Path(__file__).resolve().parents[2] / "docs/task-builder.md").read_text()
SECTION = PAGE[PAGE.index("## Configuration\n") :]
NO_FLAGS = task_builder_pb2.ExperimentFlags()


def test_both_forms_of_the_smallest_configuration_are_valid_and_equal():
    text, json = (re.search(rf"```{form}\n(.*?)```", SECTION, re.DOTALL)[1] for form in ("textproto", "json"))
    first, second = (read_config(one.encode()).config for one in (text, json))
    assert first == second
    settings = validate(first, NO_FLAGS)
    assert settings.warnings == ()
    check_dp(account(settings))


def test_every_accepted_misspelling_is_in_the_table():
    fields = [name for pairs in FIELD_ALIASES.values() for name in pairs]
    values = [f"type: {name}" for pairs in VALUE_ALIASES.values() for name in pairs]
    assert all(f"| `{name}` |" in SECTION for name in fields + values)


def test_every_field_is_in_the_table():
    def names(descriptor):
        for name, field in descriptor.fields_by_name.items():
            yield name
            if field.message_type is not None:
                yield from names(field.message_type)

    missing = {name for name in names(task_builder_pb2.TaskConfig.DESCRIPTOR) if name not in SECTION}
    assert missing == {"current_index"}


def test_every_configuration_of_the_page_passes():
    blocks = re.findall(r"^```textproto\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    for block in blocks:
        check_dp(account(validate(read_config(block.encode()).config, NO_FLAGS)))
