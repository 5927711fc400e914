"""Task configurations: protobuf text format or proto3 JSON into a `TaskConfig` (spec/task-builder.md 1.5)."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedcompute.builder.archive import MAX_CONFIG_BYTES
from fedcompute.builder.config_tree import Block, Field, Items, Kind, Value, is_json, parse_json, parse_text
from fedcompute.builder.problem import Problem, slip, unreadable
from fedcompute.protos import task_builder_pb2

# Spellings that are published somewhere and wrong, each at its own place: message -> wrong -> right.
FIELD_ALIASES: Mapping[str, Mapping[str, str]] = {
    "LearningProcess": {"sever_learning_rate": "server_learning_rate"},
    "DifferentialPrivacy": {"noise_multipiler": "noise_multiplier"},
}
VALUE_ALIASES: Mapping[str, Mapping[str, str]] = {
    "LearningProcess.type": {"FED_SDG": "FED_SGD"},
    "DifferentialPrivacy.type": {"TREE": "TREE_AGGREGATION", "ADADPTIVE_TREE": "ADAPTIVE_TREE"},
}

_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]{1,16}|[0-9]{1,22})", re.ASCII)
_DECIMAL = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_WORD_NUMBERS = {"inf": math.inf, "infinity": math.inf, "nan": math.nan}
_JSON_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_COMMA_DECIMAL = re.compile(r"-?[0-9]*,[0-9]+", re.ASCII)
_TEXT_BOOLS = {"true": True, "True": True, "t": True, "1": True, "false": False, "False": False, "f": False, "0": False}
_JSON_BOOLS = {"true": True, "false": False}
_NULL = "null"


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration as read.

    `warnings`: one line per published misspelling that was read as the right name. `lines`: field path to the line in
    which it is set.
    """

    config: task_builder_pb2.TaskConfig
    warnings: tuple[str, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)


def read_config(data: bytes) -> LoadedConfig:
    """Reads a configuration; its content, not its file's name, decides between text format and JSON.

    Raises ConfigProblems (a ConfigInvalid, CONFIG_UNREADABLE) naming line, column and field, with the nearest valid
    name where a name is unknown: the first slip of syntax, or every wrong name and value.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise unreadable(slip(1, 1, f"the configuration has {len(data)} bytes", f"at most {MAX_CONFIG_BYTES} are read"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise unreadable(slip(line, column, "the configuration is not UTF-8 text", "save it as UTF-8")) from error
    text = text.replace("\r\n", "\n")
    reader = _Reader(json=is_json(text))
    config = task_builder_pb2.TaskConfig()
    reader.fill(config, parse_json(text) if reader.json else parse_text(text), "")
    if reader.problems:
        raise unreadable(*sorted(reader.problems, key=lambda problem: (problem.line, problem.column)))
    return LoadedConfig(config, tuple(reader.warnings), reader.lines)


class _Slip(Exception):
    """A value that does not fit its field: what is wrong, what to do."""

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__(rule)
        self.rule, self.remedy = rule, remedy


@dataclass(frozen=True)
class _Given:
    """A singular field that has been set."""

    written: str
    alias: bool
    line: int
    value: Any


class _Reader:
    """Fills messages from trees and keeps what there is to say."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.lines: dict[str, int] = {}

    def fill(self, message: Any, block: Block, path: str) -> None:
        """Sets the fields of `message`, which stands at `path` ("" or "a.b.")."""
        given: dict[str, _Given] = {}
        for entry in block.fields:
            name = self._resolve(message, entry.name)
            if name is None:
                self._unknown(message, entry, path)
                continue
            alias = name not in (entry.name, _snake(message, entry.name))
            if alias:
                self._note(entry.line, entry.name, _like(entry.name, name))
            self._set(message, message.DESCRIPTOR.fields_by_name[name], entry, path, given, alias=alias)

    def _resolve(self, message: Any, written: str) -> str | None:
        """The name of the field that is written so in this message, or None."""
        descriptor = message.DESCRIPTOR
        aliases = FIELD_ALIASES.get(descriptor.name, {})
        if written in descriptor.fields_by_name:
            return written
        if written in aliases:
            return aliases[written]
        if not self.json:
            return None
        camel = {_camel(wrong): right for wrong, right in aliases.items()}
        return _snake(message, written) or camel.get(written)

    def _set(
        self, message: Any, descriptor: Any, entry: Field, path: str, given: dict[str, _Given], *, alias: bool
    ) -> None:
        name, place = descriptor.name, path + descriptor.name
        value = entry.value
        if self.json and isinstance(value, Value) and value.kind is Kind.WORD and value.text == _NULL:
            return
        if descriptor.is_repeated:
            items = value.values if isinstance(value, Items) else () if self.json else (value,)
            if self.json and not isinstance(value, Items):
                self._problem(entry, place, "", f"field {entry.name!r} is a list", "write it in brackets")
            for item in items:
                index = len(getattr(message, name))
                self._block(getattr(message, name).add(), item, entry, f"{place}[{index}]")
            return
        if isinstance(value, Items):
            self._problem(entry, place, "", f"field {entry.name!r} takes one value, not a list", "remove the brackets")
            return
        earlier = given.get(name)
        if descriptor.message_type is not None:
            if earlier is not None:
                self._twice(entry, place, earlier)
            else:
                given[name] = _Given(entry.name, alias, entry.line, None)
                self._block(getattr(message, name), value, entry, place)
            return
        try:
            found = self._scalar(descriptor, value, message.DESCRIPTOR.name)
        except _Slip as error:
            shown = value.text if isinstance(value, Value) else ""
            self._problem(value, place, shown, f"field {entry.name!r} {error.rule}", error.remedy)
            return
        if earlier is None:
            given[name] = _Given(entry.name, alias, entry.line, found)
            self.lines[place] = entry.line
            setattr(message, name, found)
        elif earlier.alias == alias:
            self._twice(entry, place, earlier)
        elif found != earlier.value:
            rule = (
                f"field {entry.name!r} is {found}, and {earlier.written!r} in line {earlier.line}, which means the "
                f"same, is {earlier.value}"
            )
            self._problem(entry, place, str(found), rule, f"keep {name!r} alone")

    def _block(self, message: Any, value: Value | Block | Items, entry: Field, place: str) -> None:
        if isinstance(value, Block):
            self.lines[place] = entry.line
            message.SetInParent()
            self.fill(message, value, f"{place}.")
            return
        shown = value.text if isinstance(value, Value) else ""
        self._problem(value, place, shown, f"field {entry.name!r} is a block, not a value", "write it with { }")

    def _scalar(self, descriptor: Any, value: Value | Block | Items, owner: str) -> Any:
        if not isinstance(value, Value):
            raise _Slip("takes a value, not a block", "remove the braces")
        if descriptor.type == descriptor.TYPE_ENUM:
            return self._enum(descriptor, value, owner)
        if descriptor.type == descriptor.TYPE_STRING:
            if value.kind is not Kind.STRING:
                raise _Slip(f"takes a text, and {value.text} stands without quotes", 'write it as "..."')
            return value.text
        if descriptor.type == descriptor.TYPE_BOOL:
            words = _JSON_BOOLS if self.json else _TEXT_BOOLS
            if value.kind is Kind.STRING or value.text not in words:
                raise _Slip(f"takes a truth value, not {value.text[:40]!r}", "write true or false")
            return words[value.text]
        if value.kind is Kind.STRING and _COMMA_DECIMAL.fullmatch(value.text):
            raise _Slip(
                "takes a number written with a dot as the decimal mark, not with a comma",
                "use a dot as the decimal mark",
            )
        if value.kind is Kind.STRING and not self.json:
            raise _Slip(f"takes a number, and {value.text[:40]!r} is a text", "remove the quotes")
        if descriptor.type == descriptor.TYPE_DOUBLE:
            return self._double(value.text)
        return self._integer(value.text, 31 if descriptor.type == descriptor.TYPE_INT32 else 63)

    def _enum(self, descriptor: Any, value: Value, owner: str) -> int:
        values = descriptor.enum_type.values_by_name
        names = [name for name, entry in values.items() if entry.number != 0]
        if value.kind is Kind.NUMBER:
            numbers = {str(entry.number): entry.number for entry in values.values()}
            if value.text not in numbers:
                raise _Slip(f"has no value {value.text}", f"there are {', '.join(names)}")
            return int(numbers[value.text])
        if value.kind is Kind.STRING and not self.json:
            raise _Slip(f"takes a name, and {value.text[:40]!r} stands in quotes", "remove the quotes")
        right = VALUE_ALIASES.get(f"{owner}.{descriptor.name}", {}).get(value.text)
        if right is not None:
            self._note(value.line, value.text, right)
        name = right or value.text
        if name not in values:
            raise _Slip(f"has no value {value.text[:40]!r}", _nearest(value.text, names))
        return int(values[name].number)

    def _integer(self, text: str, bits: int) -> int:
        number = None
        if _INTEGER.fullmatch(text) and not (self.json and text.lstrip("-")[:2].lower() == "0x"):
            digits = text.lstrip("-")
            octal = not self.json and len(digits) > 1 and digits[0] == "0" and digits[1:].isdigit()
            if octal and set(digits) & set("89"):
                raise _Slip(f"takes a whole number, not {text}", "remove the zero at its front")
            number = int(text, 8 if octal else 0 if digits[:2].lower() == "0x" else 10)
        elif self.json and _DECIMAL.fullmatch(text) and float(text).is_integer():
            number = int(float(text))
        if number is None:
            raise _Slip(f"takes a whole number, not {text[:40]}", "write it in digits, such as 10")
        if not -(2**bits) <= number < 2**bits:
            raise _Slip(f"takes a whole number of {bits + 1} bits; {text[:40]} is out of range", "write a smaller one")
        return number

    def _double(self, text: str) -> float:
        if self.json:
            if text in _JSON_NUMBERS:
                return _JSON_NUMBERS[text]
        elif (word := text.lstrip("-").lower()) in _WORD_NUMBERS and len(text) - len(word) <= 1:
            return -_WORD_NUMBERS[word] if text.startswith("-") else _WORD_NUMBERS[word]
        digits = text if self.json else text.removesuffix("f").removesuffix("F")
        if not _DECIMAL.fullmatch(digits):
            raise _Slip(f"takes a number, not {text[:40]}", "write it as 0.1 or 1e-6")
        return float(digits)

    def _unknown(self, message: Any, entry: Field, path: str) -> None:
        written = {entry.name, _snake_case(entry.name)} if self.json else {entry.name}
        homes = [home for home, known in _homes() if known in written]
        names = list(message.DESCRIPTOR.fields_by_name)
        near = difflib.get_close_matches(entry.name, names, n=1, cutoff=0.8)
        remedy = (
            f"it belongs into {' or '.join(home or 'the top level' for home in homes)}"
            if homes and not near
            else _nearest(entry.name, names)
        )
        within = f" in {path.removesuffix('.')}" if path else ""
        self._problem(entry, path + entry.name, "", f"unknown field {entry.name[:60]!r}{within}", remedy)

    def _twice(self, entry: Field, place: str, earlier: _Given) -> None:
        rule = f"field {entry.name!r} is given twice, first in line {earlier.line}"
        self._problem(entry, place, "", rule, "keep one")

    def _problem(self, at: Field | Value | Block | Items, path: str, value: str, rule: str, remedy: str) -> None:
        self.problems.append(slip(at.line, at.column, rule, remedy, path=path, value=value))

    def _note(self, line: int, written: str, right: str) -> None:
        self.warnings.append(f"config line {line}: {written!r} read as {right!r}")


def _snake(message: Any, written: str) -> str | None:
    """The field whose JSON name is `written`."""
    for name, descriptor in message.DESCRIPTOR.fields_by_name.items():
        if descriptor.json_name == written:
            return str(name)
    return None


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _snake_case(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), name)


def _like(written: str, name: str) -> str:
    return name if "_" in written else _camel(name)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not near and name.upper() in names:
        near = [name.upper()]
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def _homes(descriptor: Any = task_builder_pb2.TaskConfig.DESCRIPTOR, path: str = "") -> Iterator[tuple[str, str]]:
    """(path of the block, field name) of every field of a configuration."""
    for name, child in descriptor.fields_by_name.items():
        yield path, name
        if child.message_type is not None:
            yield from _homes(child.message_type, f"{path}.{name}".removeprefix("."))
