"""How a device shows a server who it is: a token, and the answer to a challenge (spec/device.md 3)."""

import base64
import binascii
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedcompute.device.state.history import TaskHistory
from fedcompute.errors import OperationFailed, Reason

TOKEN_HEADER = "odp-authorization-key"
PROOF_HEADER = "odp-authentication-key"
TOKEN_LIFE = 604_800  # seconds, 7 days
_SCHEME = "enrolment:v1"
_FILE_LIMIT = 16 * 1024 * 1024
_LINE_LIMIT = 1024

Prove = Callable[[bytes, str], Sequence[str]]
"""Answers a challenge on behalf of a token: the texts of the proof, none if the device cannot prove anything."""


@dataclass(frozen=True)
class Enrolment:
    """What an operator has given a device: an id, and a secret that the server knows too."""

    id: str
    secret: bytes = field(repr=False)

    def prove(self, challenge: bytes, token: str) -> list[str]:
        """The proof of an enrolled device.

        Formal guarantees: HMAC-SHA256 over challenge and token: it shows the secret to nobody and is good for this
        token alone.
        """
        mac = hmac.new(self.secret, challenge + token.encode(), hashlib.sha256).digest()
        return [_SCHEME, self.id, base64.b64encode(mac).decode()]


@dataclass(frozen=True)
class Answer:
    """The answer to a challenge: a new token and its proof, as headers."""

    token: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)


class Authorization:
    """One owner's standing with one server: a token that lasts seven days, and how to earn the next."""

    def __init__(
        self, memory: TaskHistory, server: str, owner_id: str, prove: Prove, clock: Callable[[], float] = time.time
    ) -> None:
        """`owner_id`: package and class. `clock`: Unix seconds."""
        self._memory = memory
        self._server = server
        self._owner_id = owner_id
        self._prove = prove
        self._clock = clock

    def headers(self) -> dict[str, str]:
        """The headers of a first try: the token, if there is one that has not expired."""
        token = self._memory.token(self._server, self._owner_id, self._clock())
        return {} if token is None else {TOKEN_HEADER: token}

    def answer(self, challenge: bytes) -> Answer:
        """The answer to a challenge; the token that the server would not take is forgotten."""
        self._memory.delete_token(self._server, self._owner_id)
        token = str(uuid.uuid4())
        proof = json.dumps(list(self._prove(challenge, token)))
        return Answer(token, {TOKEN_HEADER: token, PROOF_HEADER: proof})

    def keep(self, answer: Answer) -> None:
        """Keeps the token of an answer that the server has accepted."""
        self._memory.save_token(self._server, self._owner_id, answer.token, self._clock() + TOKEN_LIFE)


def read_enrolments(path: Path) -> list[Enrolment]:
    """The enrolments of a file, one line `ID:SECRET` a device, the secret in base64.

    Raises OperationFailed(SETTINGS_INVALID), which never holds a line's text.
    """
    try:
        with path.open(encoding="ascii") as file:
            text = file.read(_FILE_LIMIT + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no ASCII text"
        raise _unreadable(f"{path}: {why}") from None
    if len(text) > _FILE_LIMIT:
        raise _unreadable(f"{path} has more than {_FILE_LIMIT} bytes")
    enrolments = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        identifier, _, secret = line.strip().partition(":")
        try:
            decoded = base64.b64decode(secret, validate=True)
        except (binascii.Error, ValueError):
            decoded = b""
        if not identifier or not decoded or len(line) > _LINE_LIMIT:
            raise _unreadable(f"{path}, line {number} is not ID:SECRET")
        enrolments.append(Enrolment(identifier, decoded))
    return enrolments


def read_own_enrolment(path: Path) -> Enrolment:
    """The enrolment of a file with one line. Raises OperationFailed(SETTINGS_INVALID), as `read_enrolments`."""
    found = read_enrolments(path)
    if len(found) != 1:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"enrolment: {path} has {len(found)} lines, not one",
            remedy="give the device one line of the file that `fedcompute enrolment create` wrote",
        )
    return found[0]


def _unreadable(detail: str) -> OperationFailed:
    return OperationFailed(
        Reason.SETTINGS_INVALID, f"enrolments: {detail}", remedy="use the file that `fedcompute enrolment create` wrote"
    )
