"""How the parts of an external key service are asked: by GET, a few times, with limits (spec/server.md 7.2)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcompute.errors import OperationFailed, Reason

# It costs a tenth of a server's start, and few servers ask anybody.
if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True)
class Answer:
    """A whole answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def client(timeout: float) -> "httpx.Client":
    """A client whose every step may take `timeout` seconds; follows no redirect, which could carry a token away."""
    import httpx

    # As it is: a few compressed bytes may be gigabytes, in memory before anybody counts them.
    headers = {"accept-encoding": "identity"}
    timeouts = httpx.Timeout(timeout, connect=min(timeout, 10.0))
    return httpx.Client(headers=headers, timeout=timeouts, follow_redirects=False)


def get(
    http: "httpx.Client",
    url: str,
    headers: Mapping[str, str],
    *,
    limit: int,
    seconds: float,
    pauses: Sequence[float] = (),
    pause: Callable[[float], None] = time.sleep,
) -> Answer:
    """One answer of at most `limit` bytes, its body within `seconds`, tried again after each of `pauses` (seconds).

    An answer of 500 or more counts as none until the last attempt. Raises OperationFailed(KEY_SERVICE_FAILED), whose
    text holds neither URL nor headers; also for a body that is compressed although nobody asked for it.
    """
    import httpx

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


def _once(http: "httpx.Client", url: str, headers: Mapping[str, str], limit: int, seconds: float) -> Answer:
    deadline = time.monotonic() + seconds
    with http.stream("GET", url, headers=dict(headers)) as answer:
        body = read_body(answer, limit, deadline)
        if body is None:
            detail = f"an answer of a key service is over {limit} bytes or {seconds:.0f} s, or compressed"
            raise OperationFailed(Reason.KEY_SERVICE_FAILED, detail)
        return Answer(answer.status_code, dict(answer.headers), body)


def read_body(answer: "httpx.Response", limit: int, deadline: float) -> bytes | None:
    """The body of a streamed answer; None if it is over `limit` bytes, compressed, or not whole at `deadline`.

    The clock (seconds, monotonic) is looked at after every piece, however small: a sender may drip.
    """
    if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
        return None
    body = bytearray()
    for part in answer.iter_raw():
        body += part
        if len(body) > limit or time.monotonic() > deadline:
            return None
    return bytes(body)
