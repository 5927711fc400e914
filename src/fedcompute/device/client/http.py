"""How a device talks HTTP: which URLs, how often, how much (spec/device.md 1.1)."""

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urljoin, urlsplit

import httpx

from fedcompute.errors import DeviceRunFailed, Reason

MESSAGE_BYTES_LIMIT = 1 << 20
_SUCCESS = frozenset({200, 201})
# An answer of this kind does not change by asking again.
_FINAL = _SUCCESS | {401, 403}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 20
_OWN_HEADERS = frozenset({"content-length", "transfer-encoding", "host", "connection"})

# httpx logs every URL at level INFO, and the URLs of uploads and downloads carry signatures.
logging.getLogger("httpx").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Response:
    """An answer with its whole body, as it came: no content encoding is undone. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Only 200 and 201 are success; 204 is not."""
        return self.status in _SUCCESS


@dataclass(frozen=True)
class Retries:
    """`attempts` in total; between two of them a uniform pause of 0.5 to 1.5 times `delay` seconds, doubling."""

    attempts: int = 3
    delay: float = 0.2


class Transport:
    """An HTTP client for devices; one serves all devices of a process. Use as an async context manager."""

    def __init__(
        self,
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 30.0,
        retries: Retries | None = None,
        connections: int = 100,
    ) -> None:
        """Timeouts in seconds. `connections`: how many may be open at once; a request waits for a free one."""
        timeout = httpx.Timeout(read_timeout, connect=connect_timeout, pool=None)
        self._client = httpx.AsyncClient(
            timeout=timeout, limits=httpx.Limits(max_connections=connections), follow_redirects=False
        )
        for name in ("accept", "accept-encoding"):
            # The protocol sets them nowhere but where a resource is announced as gzip.
            del self._client.headers[name]
        self._client.headers["user-agent"] = "fedcompute-device"
        self._retries = retries if retries is not None else Retries()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def request(
        self,
        method: str,
        url: str,
        *,
        what: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int = MESSAGE_BYTES_LIMIT,
    ) -> Response:
        """Sends one request, up to three times, with the same headers and body; returns the last answer.

        `what` names the request in errors, which never hold its URL. `limit`: bytes of the answer's body. A GET
        follows redirects within its scheme; a POST or PUT follows none.
        Raises DeviceRunFailed: URL_NOT_ALLOWED before any I/O, SERVER_UNREACHABLE if the last attempt found no
        server, SERVER_ANSWER_INVALID for a body over the limit or headers that cannot be sent.
        """
        check_url(url, what)
        sent = dict(headers or {})
        if any(name.lower() in _OWN_HEADERS for name in sent):
            raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"{what}: a header that the client sets by itself")
        for attempt in range(self._retries.attempts):
            last = attempt + 1 >= self._retries.attempts
            try:
                response = await self._follow(method, url, what, sent, body, limit)
            except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError) as error:
                detail = f"{what}: a URL or header that cannot be sent ({type(error).__name__})"
                raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, detail) from None
            except httpx.TransportError as error:
                if last:
                    detail = f"{what}: {type(error).__name__} after {self._retries.attempts} attempts"
                    raise DeviceRunFailed(Reason.SERVER_UNREACHABLE, detail) from None
            else:
                if last or response.status in _FINAL:
                    return response
            await asyncio.sleep(self._retries.delay * 2**attempt * random.uniform(0.5, 1.5))
        raise ValueError("retries.attempts must be at least 1")

    async def _follow(
        self, method: str, url: str, what: str, headers: Mapping[str, str], body: bytes | None, limit: int
    ) -> Response:
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._once(method, url, what, headers, body, limit)
            location = response.headers.get("location")
            if method != "GET" or response.status not in _REDIRECTS or location is None:
                return response
            target = urljoin(url, location)
            if urlsplit(target).scheme != urlsplit(url).scheme:
                return response
            check_url(target, what)
            url = target
        return response

    async def _once(
        self, method: str, url: str, what: str, headers: Mapping[str, str], body: bytes | None, limit: int
    ) -> Response:
        async with self._client.stream(method, url, headers=dict(headers), content=body) as answer:
            data = bytearray()
            async for chunk in answer.aiter_raw():
                data += chunk
                if len(data) > limit:
                    raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"{what}: an answer of more than {limit} bytes")
            return Response(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, bytes(data))


def check_url(url: str, what: str) -> None:
    """Raises DeviceRunFailed (URL_NOT_ALLOWED) unless the URL is https, or http on localhost with a port."""
    if not url.startswith(("https://", "http://localhost:")):
        raise DeviceRunFailed(Reason.URL_NOT_ALLOWED, f"{what}: neither https:// nor http://localhost:<port>")


def join_url(base: str, suffix: str) -> str:
    """`base` without one trailing slash, a slash, `suffix` without a leading one; nothing is escaped (spec 1.1)."""
    return f"{base.removesuffix('/')}/{suffix.removeprefix('/')}"
