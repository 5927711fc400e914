"""Log lines: one event each, with what the server was about, and nothing that a log must not hold.

A line carries time, level, logger, message and the facts of the moment: request and correlation id, population, task,
iteration. As text it is one line (a traceback follows, indented); as JSON it is one object.
"""

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TextIO

from fedcompute.storage.api_keys import without_keys

Facts = Mapping[str, str]

_FACTS: ContextVar[tuple[Callable[[], Facts], ...]] = ContextVar("facts", default=())
# Whatever ends a line, moves the cursor or turns the direction of writing, and what no encoding can hold.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# Without authentication a session's id is its only secret.
_SESSION = re.compile(r"(?<![0-9a-f])([0-9a-f]{8})-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![0-9a-f])", re.I)
# Not anchored on the left, where a pattern that repeats would take a hostile line's length squared.
_PARAMETER = re.compile(r"((?:signature|credential|token|secret|password|key|key[-_]?id|sig)=)[^&\s'\"]+", re.I)
_BEARER = re.compile(r"(\bbearer\s)\s*[A-Za-z0-9._~+/=-]+", re.I)
# Up to the last @ of a word: a password may hold / and ?, and one that nobody escaped @ as well.
_LOGIN = re.compile(r"(\w://)\S{1,1000}@")
_PLAIN = re.compile(r"[\w./:@+-]+")
_LONGEST_FACT = 200
_LONGEST_MESSAGE = 4_000
_LONGEST_TRACE = 40_000


@dataclass(frozen=True)
class Logs:
    """How this process logs; worker processes do the same."""

    level: str = "warning"
    form: str = "text"  # or json


class _Handler(logging.StreamHandler[TextIO]):
    """Marks the handler that is ours among those of a host program."""


_current: Logs | None = None


def configure_logging(logs: Logs) -> None:
    """Sends lines of `logs.level` and above to stderr, in the form that `logs` names; a second call replaces it."""
    global _current
    _current = logs
    handler = _Handler(sys.stderr)
    handler.setFormatter(JsonFormatter() if logs.form == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logs.level.upper())
    logging.captureWarnings(True)
    # HTTP clients log whole URLs, which hold keys and signatures; alembic every plugin of its own at each start.
    for name in ("httpx", "httpcore", "alembic.runtime.plugins"):
        logging.getLogger(name).setLevel(logging.WARNING)


def current_logs() -> Logs | None:
    """What `configure_logging` was told last in this process, None before."""
    return _current


@contextlib.contextmanager
def bound(facts: Facts | Callable[[], Facts]) -> Iterator[None]:
    """Lines that the block logs carry these facts too, also on threads to which the context is copied.

    A function is asked only when a line is written, which on a busy path is hardly ever.
    """
    token = _FACTS.set((*_FACTS.get(), facts if callable(facts) else lambda: facts))
    try:
        yield
    finally:
        _FACTS.reset(token)


def facts() -> dict[str, str]:
    """The facts of the moment; of two with one name the inner one."""
    return {name: without_keys(value) for source in _FACTS.get() for name, value in source().items() if value}


def escaped(text: str) -> str:
    """The text without control characters, which stand as \\n or \\x1b instead: it cannot end or forge a line."""
    return _CONTROL.sub(_escape, text)


def redacted(text: str) -> str:
    """The text without session ids (eight characters stay), signatures, API keys, bearer tokens, passwords, logins."""
    text = _BEARER.sub(r"\1***", without_keys(_SESSION.sub(r"\1...", text)))
    if "=" in text:
        text = _PARAMETER.sub(r"\1***", text)
    return _LOGIN.sub(r"\1***@", text) if "@" in text else text


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z WARNING fedcompute.access: message name=value ...`, a traceback indented below."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line = f"{_moment(record)} {record.levelname} {record.name}: {escaped(_message(record))}"
        for name, value in facts().items():
            line += f" {name}={_word(value)}"
        for below in _trace(self, record).splitlines():
            line += f"\n  | {escaped(below)}"
        return line


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, logger, message, process, the facts, a record's own fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the object."""
        document: dict[str, object] = {
            "time": _moment(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            "process": record.process,
        }
        document |= {name: value[:_LONGEST_FACT] for name, value in facts().items()}
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            document |= {
                name: redacted(one[:_LONGEST_MESSAGE]) if isinstance(one, str) else one for name, one in fields.items()
            }
        trace = _trace(self, record)
        if trace:
            document["traceback"] = trace
        return json.dumps(document, default=str)


def _moment(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    # Of a worker process comes the text, since its exceptions cannot travel.
    told = getattr(record, "trace", None)
    text = told if isinstance(told, str) else ""
    if record.exc_info and record.exc_info[0] is not None:
        text = formatter.formatException(record.exc_info)
    return redacted(text[-_LONGEST_TRACE:])


def _message(record: logging.LogRecord) -> str:
    # Cut first: what is sent to us may be long.
    return redacted(record.getMessage()[:_LONGEST_MESSAGE])


def _word(value: str) -> str:
    value = value[:_LONGEST_FACT]
    return value if _PLAIN.fullmatch(value) and value.isascii() else escaped(json.dumps(value, ensure_ascii=False))


def _escape(match: "re.Match[str]") -> str:
    code = ord(match.group())
    return {10: "\\n", 13: "\\r", 9: "\\t"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
