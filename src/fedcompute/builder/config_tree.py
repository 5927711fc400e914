"""Configuration text as a tree of named values with their places: protobuf text format, or JSON with comments.

Knows nothing of the fields that a configuration has; `config` does.
"""

import enum
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fedcompute.builder.problem import slip, unreadable

MAX_DEPTH = 20

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\n\f\v]+|\#[^\n]*)
    |(?P<word>[A-Za-z_]\w*|-[A-Za-z_]\w*)
    |(?P<number>-?(?:\d|\.\d)(?:[eE][+-]|[\w.])*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<mark>[{}<>\[\]:,;])""",
    re.ASCII | re.VERBOSE,
)
_ESCAPE = re.compile(
    rb"\\(?:([abfnrtv\\'\"?])|([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))"
)
_SIMPLE = dict(zip(b"abfnrtv\\'\"?", b"\a\b\f\n\r\t\v\\'\"?", strict=True))
_CLOSING = {"{": "}", "<": ">"}


class Kind(enum.Enum):
    """How a value is written; of JSON's words `true`, `false` and `null` are words too."""

    WORD = "word"
    NUMBER = "number"
    STRING = "string"


@dataclass(frozen=True)
class Value:
    """One scalar: a string decoded, anything else as it is written."""

    kind: Kind
    text: str
    line: int
    column: int


@dataclass(frozen=True)
class Block:
    """What stands between braces, in its order."""

    fields: "tuple[Field, ...]"
    line: int
    column: int


@dataclass(frozen=True)
class Items:
    """What stands between brackets."""

    values: tuple[Value | Block, ...]
    line: int
    column: int


@dataclass(frozen=True)
class Field:
    """A name and its value; the place is the name's."""

    name: str
    value: Value | Block | Items
    line: int
    column: int


@dataclass(frozen=True)
class _Token:
    kind: str  # a group of _TOKEN, or "end"
    text: str
    line: int
    column: int
    start: int


def is_json(text: str) -> bool:
    """Whether the first significant character is an opening brace, which text format never starts with."""
    first = next(_tokens(text, patient=True), None)
    return first is not None and first.text == "{"


def parse_text(text: str) -> Block:
    """Text format as a tree. Raises ConfigProblems (CONFIG_UNREADABLE) at the first place that does not fit."""
    return _Text(text).document()


def parse_json(text: str) -> Block:
    """A JSON object as a tree; `#` comments are allowed. Raises ConfigProblems as `parse_text` does."""
    return _Json(text).document()


def _tokens(text: str, *, patient: bool = False) -> Iterator[_Token]:
    """The tokens without blanks and comments, then one "end"; `patient` ends at what is none instead of raising."""
    position, line, line_start = 0, 1, 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        column = position - line_start + 1
        if found is None:
            if patient:
                return
            _refuse_character(text, position, line, column)
        if found.lastgroup != "blank":
            yield _Token(str(found.lastgroup), found[0], line, column, position)
        if newlines := found[0].count("\n"):
            line += newlines
            line_start = position + found[0].rindex("\n") + 1
        position = found.end()
    yield _Token("end", "", line, position - line_start + 1, position)


def _refuse_character(text: str, position: int, line: int, column: int) -> NoReturn:
    character = text[position]
    if character in "\"'":
        raise unreadable(slip(line, column, "a string does not end in its line", f"close it with {character}"))
    if character.isascii() and character.isprintable():
        raise unreadable(slip(line, column, f"the character {character!r} cannot stand here", "remove it"))
    name = unicodedata.name(character, f"U+{ord(character):04X}")
    raise unreadable(slip(line, column, f"the character {name} cannot stand here", "retype it with a plain keyboard"))


class _Parser:
    """One pass over the tokens with one of lookahead; the two syntaxes differ in fields and values."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._rest = _tokens(text)
        self._next = next(self._rest)
        self._names: list[str] = []  # of the open fields, for messages

    def _take(self) -> _Token:
        token = self._next
        if token.kind != "end":
            self._next = next(self._rest)
        return token

    def _at(self, *marks: str) -> bool:
        return self._next.kind == "mark" and self._next.text in marks

    def _deeper(self, token: _Token) -> None:
        if len(self._names) > MAX_DEPTH:
            raise unreadable(slip(token.line, token.column, f"over {MAX_DEPTH} blocks in each other", "flatten it"))

    def _refuse(self, expected: str, remedy: str = "correct the text here or just before") -> NoReturn:
        token = self._next
        # A comma between two digits: the parser sees a value, a separator and a stray number.
        if token.kind == "number" and re.search(r"\d,$", self._text[max(0, token.start - 2) : token.start]):
            where = f"field {self._last!r}: " if self._last else ""
            rule = f"{where}a number is written with a dot as the decimal mark, not with a comma"
            raise unreadable(slip(token.line, token.column - 1, rule, "use a dot as the decimal mark"))
        found = repr(token.text[:40]) if token.text else "the end of the configuration"
        within = f" in {self._names[-1]!r}" if self._names else ""
        raise unreadable(slip(token.line, token.column, f"expected {expected}{within}, found {found}", remedy))

    _last = ""  # name of the field read last


class _Text(_Parser):
    def document(self) -> Block:
        fields = self._fields()
        if self._next.kind != "end":
            self._refuse("a field name", "an opening brace is missing, or this closing one is too many")
        return Block(fields, 1, 1)

    def _fields(self) -> tuple[Field, ...]:
        fields = []
        while self._next.kind == "word" and not self._next.text.startswith("-"):
            name = self._take()
            self._last = name.text
            colon = self._at(":")
            if colon:
                self._take()
            fields.append(Field(name.text, self._value(name, colon), name.line, name.column))
            if self._at(",", ";"):
                self._take()
        return tuple(fields)

    def _value(self, name: _Token, colon: bool) -> Value | Block | Items:
        if self._at("{", "<"):
            return self._block(name)
        if self._at("["):
            start = self._take()
            values: list[Value | Block] = []
            while not self._at("]"):
                values.append(self._block(name) if self._at("{", "<") else self._scalar())
                if not self._at(","):
                    break
                self._take()
                if self._at("]"):
                    self._refuse("another value")
            if not self._at("]"):
                self._refuse("']'")
            self._take()
            return Items(tuple(values), start.line, start.column)
        if not colon:
            self._refuse("':' or '{'", f"write a colon after {name.text!r}")
        return self._scalar()

    def _block(self, name: _Token) -> Block:
        start = self._take()
        self._names.append(name.text)
        self._deeper(start)
        fields = self._fields()
        if not self._at(_CLOSING[start.text]):
            self._refuse(f"a field name or {_CLOSING[start.text]!r}", f"{name.text!r} was opened in line {start.line}")
        self._take()
        self._names.pop()
        return Block(fields, start.line, start.column)

    def _scalar(self) -> Value:
        token = self._next
        if token.kind not in ("word", "number", "string"):
            self._refuse(f"a value for {self._last!r}")
        self._take()
        if token.kind != "string":
            return Value(Kind(token.kind), token.text, token.line, token.column)
        parts = [_unescape(token)]
        while self._next.kind == "string":
            parts.append(_unescape(self._take()))
        return Value(Kind.STRING, "".join(parts), token.line, token.column)


class _Json(_Parser):
    def document(self) -> Block:
        block = self._object()
        if self._next.kind != "end":
            self._refuse("nothing after the closing brace")
        return block

    def _object(self) -> Block:
        start = self._take()
        self._deeper(start)
        fields: list[Field] = []
        while not self._at("}"):
            if fields:
                if not self._at(","):
                    self._refuse("',' or '}'")
                self._take()
            if self._next.kind != "string":
                self._refuse("a field name in double quotes")
            key = self._take()
            self._last = name = _json_string(key)
            if not self._at(":"):
                self._refuse(f"':' after {name!r}")
            self._take()
            self._names.append(name)
            fields.append(Field(name, self._value(), key.line, key.column))
            self._names.pop()
        self._take()
        return Block(tuple(fields), start.line, start.column)

    def _value(self) -> Value | Block | Items:
        return self._array() if self._at("[") else self._item()

    def _array(self) -> Items:
        start = self._take()
        values: list[Value | Block] = []
        while not self._at("]"):
            if values:
                if not self._at(","):
                    self._refuse("',' or ']'")
                self._take()
            values.append(self._item())
        self._take()
        return Items(tuple(values), start.line, start.column)

    def _item(self) -> Value | Block:
        if self._at("{"):
            return self._object()
        token = self._next
        if token.kind == "word" and token.text not in ("true", "false", "null"):
            self._refuse("a JSON value", "names and texts stand in double quotes")
        if token.kind not in ("word", "number", "string"):
            self._refuse("a JSON value")
        self._take()
        text = _json_string(token) if token.kind == "string" else token.text
        return Value(Kind(token.kind), text, token.line, token.column)


def _json_string(token: _Token) -> str:
    try:
        text = json.loads(token.text)
        text.encode()
    except ValueError:
        rule = "this is no JSON string"
        raise unreadable(
            slip(token.line, token.column, rule, "use double quotes and the escapes that JSON has")
        ) from None
    assert isinstance(text, str), "the token starts with a quote"
    return text


def _unescape(token: _Token) -> str:
    """The string of a text format literal, whose escapes are those of C."""
    source = token.text[1:-1].encode()
    parts: list[bytes] = []
    position = 0
    while (start := source.find(b"\\", position)) >= 0:
        parts.append(source[position:start])
        found = _ESCAPE.match(source, start)
        code = _code_point(found.groups()) if found is not None else None
        if found is None or code is None:
            escape = source[start : start + 2].decode(errors="replace")
            raise unreadable(
                slip(
                    token.line, token.column, f"the string has the unknown escape {escape!r}", "write a backslash twice"
                )
            )
        parts.append(code)
        position = found.end()
    try:
        return b"".join([*parts, source[position:]]).decode()
    except UnicodeDecodeError:
        raise unreadable(
            slip(token.line, token.column, "the string's escapes give no UTF-8 text", "write the characters")
        ) from None


def _code_point(groups: Sequence[bytes | None]) -> bytes | None:
    simple, octal, hexadecimal, short, long = groups
    if simple is not None:
        return bytes([_SIMPLE[simple[0]]])
    if octal is not None:
        return bytes([int(octal, 8)]) if int(octal, 8) < 256 else None
    if hexadecimal is not None:
        return bytes([int(hexadecimal, 16)])
    code = int(short or long or b"0", 16)
    return chr(code).encode(errors="surrogatepass") if code < 0x110000 else None
