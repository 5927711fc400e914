"""A worker on a node of a Ray cluster: a process that runs one job at a time, and what is told of jobs on the way.

Ray moves what it moves through memory that it may write to disk, and private keys and noise travel with jobs. So a job
is encrypted to a key that its worker made and holds in memory alone, and its result to one of the process that asked.
"""

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcompute.crypto.hpke import open_sealed, seal
from fedcompute.server.executors import Failure, guarded, import_jobs, with_facts, with_spans
from fedcompute.server.job_data import decode_data, encode_data, named
from fedcompute.server.logs import Logs, bound, facts
from fedcompute.server.worker_memory import keep_freed_memory
from fedcompute.tracing import Origin

_INFO = b"fedcompute: jobs on other machines, version 1"
# Of one job; whoever counts more has read enough.
_MOST_LINES = 1_000
_LONGEST_MESSAGE, _LONGEST_TRACE = 4_000, 40_000


@dataclass(frozen=True)
class Call:
    """A job by its name (`job_data.name_of`), its argument, and what its lines and spans are to tell."""

    job: str
    argument: Any
    facts: Mapping[str, str]
    origin: Origin | None = None
    logs: Logs | None = None


@dataclass(frozen=True)
class Line:
    """What a job logged. `created`: seconds since 1970; `trace`: a traceback, or empty."""

    created: float
    level: int
    logger: str
    message: str
    trace: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Reply:
    """What `settle` takes, and what the job logged."""

    result: Any
    lines: tuple[Line, ...]


class Box:
    """A key pair that lives as long as its process, and what it opens.

    Formal guarantees: what is sealed to `public_key` can be read by this process alone (HPKE base mode, as
    `crypto.hpke.seal` states), so neither Ray's object store nor what it spills tells anything but sizes. Nothing here
    says who the other side is: that is Ray's, whose nodes trust each other.
    """

    def __init__(self) -> None:
        key = X25519PrivateKey.generate()
        self._private_key = key.private_bytes_raw()
        self.public_key = key.public_key().public_bytes_raw()

    def open(self, sealed: bytes) -> bytes:
        """What `seal_for` was given with this box's key; raises UploadRejected(DECRYPTION_FAILED) for anything else.

        Formal guarantees: as the class.
        """
        return open_sealed(self._private_key, sealed, _INFO)


def seal_for(public_key: bytes, data: bytes) -> bytes:
    """Encrypts `data` to another process's box.

    Formal guarantees: as `Box`.
    """
    return seal(public_key, data, _INFO)


class Worker:
    """Runs jobs; Ray makes an actor of it."""

    def __init__(self, asker: bytes) -> None:
        """`asker`: public key of the process that gets the results."""
        keep_freed_memory()
        import_jobs(None)
        self._asker = asker
        self._box = Box()

    def public_key(self) -> bytes:
        """What jobs must be sealed to; also an answer to whether this worker lives."""
        return self._box.public_key

    def run(self, sealed: bytes) -> bytes:
        """Runs a sealed `Call`; returns its sealed `Reply`, in which every error is told."""
        return seal_for(self._asker, run_call(self._box.open(sealed)))


def run_call(data: bytes) -> bytes:
    """An encoded `Call` in, an encoded `Reply` out."""
    kept = _Kept()
    logging.getLogger().addHandler(kept)
    try:
        result = guarded(_run, data)
        try:
            return encode_data(Reply(result, tuple(kept.lines)))
        except Exception as error:
            return encode_data(Reply(guarded(_raise, error), tuple(kept.lines)))
    finally:
        logging.getLogger().removeHandler(kept)


def _run(data: bytes) -> Any:
    call = decode_data(data)
    if not isinstance(call, Call):
        raise TypeError(f"{type(call).__name__} is no call")
    logging.getLogger().setLevel((call.logs or Logs()).level.upper())
    job = named(call.job)
    about = {**call.facts, "node": platform.node()}
    traced = job if call.origin is None else partial(with_spans, call.origin, job)
    return with_facts(about, traced, call.argument)


def _raise(error: Exception) -> Failure:
    raise error


class _Kept(logging.Handler):
    """Keeps what a job logs, for whoever asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.lines) >= _MOST_LINES:
            return
        trace = getattr(record, "trace", "")
        if record.exc_info and record.exc_info[0] is not None:
            trace = logging.Formatter().formatException(record.exc_info)
        message = record.getMessage()[:_LONGEST_MESSAGE]
        self.lines.append(
            Line(record.created, record.levelno, record.name, message, trace[-_LONGEST_TRACE:], dict(facts()))
        )


def log_lines(lines: tuple[Line, ...]) -> None:
    """Logs here what a job logged elsewhere."""
    for line in lines:
        logger = logging.getLogger(line.logger)
        if logger.isEnabledFor(line.level):
            with bound(line.facts):
                logger.handle(
                    logging.makeLogRecord(
                        {
                            "name": line.logger,
                            "levelno": line.level,
                            "levelname": logging.getLevelName(line.level),
                            "msg": line.message,
                            "created": line.created,
                            "msecs": line.created % 1 * 1000,
                            "trace": line.trace,
                        }
                    )
                )
