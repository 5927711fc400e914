"""Task configurations: protobuf text format or proto3 JSON into a `TaskConfig` (spec/task-builder.md 1.5)."""

import difflib
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from google.protobuf import json_format, text_format

from fedcompute.errors import ConfigInvalid, Reason
from fedcompute.protos import task_builder_pb2

MAX_CONFIG_BYTES = 1 << 20

_UNKNOWN_FIELD = re.compile(r'Message type "(?P<type>[\w.]+)" has no field named "(?P<name>[^"]*)"')
_UNKNOWN_VALUE = re.compile(r'Enum type "(?P<type>[\w.]+)" has no value named (?P<name>\w+)')
_POSITION = re.compile(r"^\d+:\d+ : ")
_ECHO = re.compile(r"^'.*': (?=[A-Z])")
_PACKAGE = re.compile(r"google\.ondevicepersonalization\.federatedcompute\.proto\.")
_COMMA_DECIMAL = re.compile(r"\d,\d")
_FIELD = re.compile(r"([A-Za-z_]\w*)\s*[:{]?\s*$")


def read_config(data: bytes) -> task_builder_pb2.TaskConfig:
    """Reads a configuration; its content, not its file's name, decides between text format and JSON.

    Raises ConfigInvalid (CONFIG_UNREADABLE) naming line, column and field, with the nearest valid name where a name
    is unknown.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigInvalid(
            Reason.CONFIG_UNREADABLE, f"the configuration has {len(data)} bytes; at most {MAX_CONFIG_BYTES} are read"
        )
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigInvalid(Reason.CONFIG_UNREADABLE, f"line {line}: the configuration is not UTF-8 text") from error
    return _read_json(text) if text.lstrip().startswith("{") else _read_text(text)


def _read_json(text: str) -> task_builder_pb2.TaskConfig:
    try:
        return json_format.Parse(text, task_builder_pb2.TaskConfig(), max_recursion_depth=20)
    except json_format.ParseError as error:
        raise ConfigInvalid(Reason.CONFIG_UNREADABLE, f"the configuration is no valid JSON form: {error}") from error


def _read_text(text: str) -> task_builder_pb2.TaskConfig:
    lines = text.split("\n")
    _refuse_paste_damage(lines)
    try:
        return text_format.Parse(text, task_builder_pb2.TaskConfig())
    except text_format.ParseError as error:
        raise ConfigInvalid(Reason.CONFIG_UNREADABLE, _explain(error, lines)) from error


def _refuse_paste_damage(lines: list[str]) -> None:
    for number, line in enumerate(lines, start=1):
        for column, character in _code(line):
            if not character.isascii():
                name = unicodedata.name(character, f"U+{ord(character):04X}")
                raise ConfigInvalid(
                    Reason.CONFIG_UNREADABLE,
                    f"line {number}, column {column}: the character {name} cannot stand here; "
                    "retype it with a plain keyboard",
                )


def _code(line: str) -> Iterator[tuple[int, str]]:
    """The characters of a line outside strings and comments, with their columns."""
    quote = ""
    escaped = False
    for column, character in enumerate(line, start=1):
        if quote:
            if character == quote and not escaped:
                quote = ""
            escaped = character == "\\" and not escaped
        elif character in "\"'":
            quote = character
        elif character == "#":
            return
        else:
            yield column, character


def _explain(error: text_format.ParseError, lines: list[str]) -> str:
    line, column = error.GetLine() or 1, error.GetColumn() or 1
    cause = _ECHO.sub("", _POSITION.sub("", str(error)).replace("\n", " "))
    source = lines[line - 1] if line <= len(lines) else ""
    where = f"line {line}, column {column}"
    if _COMMA_DECIMAL.search(_without_comment(source)):
        field = _field_before(source, source.find(",") + 1)
        return f"{where}: field {field!r}: a number is written with a dot as the decimal mark, not with a comma"
    if unknown := _UNKNOWN_FIELD.search(cause):
        message = _descriptor(unknown["type"])
        names = [field.name for field in message.fields] if message else []
        return f"{where}: unknown field {unknown['name']!r}{_nearest(unknown['name'], names)}"
    if unknown := _UNKNOWN_VALUE.search(cause):
        field = _field_before(source, column)
        near = _nearest(unknown["name"], _values(unknown["type"]))
        return f"{where}: field {field!r} has no value {unknown['name']!r}{near}"
    field = "" if cause.startswith("Expected identifier") else _field_before(source, column)
    return f"{where}: {f'field {field!r}: ' if field else ''}{_PACKAGE.sub('', cause)}"


def _without_comment(line: str) -> str:
    return "".join(character for _, character in _code(line))


def _field_before(line: str, column: int) -> str:
    """The last field name that stands before a column, however the value after it is written."""
    before = line[: column - 1]
    found = _FIELD.search(before) or next(iter(reversed(list(re.finditer(r"([A-Za-z_]\w*)\s*[:{]", before)))), None)
    return found[1] if found else ""


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not near and name.upper() in names:
        near = [name.upper()]
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(names)}" if names else ""


def _messages(root: Any) -> Iterator[Any]:
    yield root
    for field in root.fields:
        if field.message_type is not None:
            yield from _messages(field.message_type)


def _descriptor(full_name: str) -> Any:
    tree = _messages(task_builder_pb2.TaskConfig.DESCRIPTOR)
    return next((message for message in tree if message.full_name == full_name), None)


def _values(enum_name: str) -> list[str]:
    for message in _messages(task_builder_pb2.TaskConfig.DESCRIPTOR):
        for field in message.fields:
            if field.enum_type is not None and field.enum_type.full_name == enum_name:
                return [value.name for value in field.enum_type.values if value.number != 0]
    return []
