"""How the values of settings are written: as text at a prompt and in the environment, as TOML in a file."""

import json
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from fedcompute.server.settings import RetryWindow

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Kind:
    """How values of one type are written: at a prompt and in the environment as text, in a file as TOML."""

    metavar: str
    read_text: Callable[[str], Any]  # raises ValueError
    read_toml: Callable[[Any], Any]  # raises ValueError
    write_toml: Callable[[Any], str]
    show: Callable[[Any], str] = str  # for people
    many: bool = False  # a list: at a prompt the option is repeated, or commas stand between
    is_switch: bool = False  # at a prompt without a value


def kind_of_type(annotation: Any) -> Kind:
    """How values of a type are written; raises TypeError for one that no setting can have."""
    if annotation in _KINDS:
        return _KINDS[annotation]
    arguments = [one for one in get_args(annotation) if one not in (types.NoneType, ...)]
    if get_origin(annotation) in (Union, types.UnionType) and len(arguments) == 1:
        return kind_of_type(arguments[0])
    if get_origin(annotation) is tuple and len(arguments) == 1:
        return _many(kind_of_type(arguments[0]))
    raise TypeError(f"no setting can have the type {annotation}")


def _many(inner: Kind) -> Kind:
    def from_text(text: str) -> tuple[Any, ...]:
        return tuple(inner.read_text(one.strip()) for one in text.split(",") if one.strip())

    def from_toml(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is no list")
        return tuple(inner.read_toml(one) for one in value)

    def to_toml(value: Any) -> str:
        return f"[{', '.join(inner.write_toml(one) for one in value)}]"

    return Kind(inner.metavar, from_text, from_toml, to_toml, ", ".join, many=True)


def _bool_from_text(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_YES, *_NO):
        raise ValueError(f"{text!r} is neither true nor false")
    return word in _YES


def _bool_from_toml(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _int_from_text(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text[:100]!r} is no whole number") from None


def _int_from_toml(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _float_from_text(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text[:100]!r} is no number")
    return number


def _float_from_toml(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _window_from_text(text: str) -> RetryWindow:
    minimum, _, maximum = text.partition(":")
    try:
        return RetryWindow(_float_from_text(minimum), _float_from_text(maximum or minimum))
    except ValueError:
        raise ValueError(f"{text[:100]!r} is no window of seconds; write it as 60:300") from None


def _window_from_toml(value: Any) -> RetryWindow:
    if isinstance(value, str):
        return _window_from_text(value)
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2:
        raise ValueError(f"{value!r} is no window of seconds; write it as [60, 300]")
    return RetryWindow(*map(_float_from_toml, both))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def toml_string(value: Any) -> str:
    """The value's text as a TOML basic string, which is a JSON string but for the delete character."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


_KINDS: dict[Any, Kind] = {
    bool: Kind(
        "",
        _bool_from_text,
        _bool_from_toml,
        lambda value: str(value).lower(),
        lambda value: "yes" if value else "no",
        is_switch=True,
    ),
    int: Kind("INTEGER", _int_from_text, _int_from_toml, str),
    float: Kind("NUMBER", _float_from_text, _float_from_toml, repr, "{:g}".format),
    str: Kind("TEXT", str, _text, toml_string),
    Path: Kind("PATH", Path, lambda value: Path(_text(value)), toml_string),
    RetryWindow: Kind(
        "MIN:MAX",
        _window_from_text,
        _window_from_toml,
        lambda window: f"[{window.minimum!r}, {window.maximum!r}]",
        lambda window: f"{window.minimum:g}:{window.maximum:g}",
    ),
}
