"""How the parts of an external key service are asked: by GET, a few times, with limits (spec/server.md 7.2)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from fedcompute.errors import OperationFailed, Reason


@dataclass(frozen=True)
class Answer:
    """A whole answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def client(timeout: float) -> httpx.Client:
    """A client whose every step may take `timeout` seconds; follows no redirect, which could carry a token away."""
    return httpx.Client(timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)), follow_redirects=False)


def get(
    http: httpx.Client,
    url: str,
    headers: Mapping[str, str],
    *,
    limit: int,
    seconds: float,
    pauses: Sequence[float] = (),
    pause: Callable[[float], None] = time.sleep,
) -> Answer:
    """One answer of at most `limit` bytes within `seconds`, tried again after each of `pauses` (seconds).

    An answer of 500 or more counts as none until the last attempt. Raises OperationFailed(KEY_SERVICE_FAILED), whose
    text holds neither URL nor headers.
    """
    for wait in (*pauses, None):
        try:
            answer = _once(http, url, headers, limit, seconds)
            if answer.status < 500 or wait is None:
                return answer
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if wait is None:
                detail = f"a key service does not answer: {type(error).__name__}"
                raise OperationFailed(Reason.KEY_SERVICE_FAILED, detail) from None
        pause(wait)
    raise AssertionError("the last attempt returns or raises")


def _once(http: httpx.Client, url: str, headers: Mapping[str, str], limit: int, seconds: float) -> Answer:
    deadline = time.monotonic() + seconds
    with http.stream("GET", url, headers=dict(headers)) as answer:
        body = bytearray()
        for part in answer.iter_bytes(64 * 1024):
            body += part
            if len(body) > limit or time.monotonic() > deadline:
                detail = f"an answer of a key service is over {limit} bytes or {seconds:.0f} s"
                raise OperationFailed(Reason.KEY_SERVICE_FAILED, detail)
        return Answer(answer.status_code, dict(answer.headers), bytes(body))
