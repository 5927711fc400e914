"""Data that a vendor publishes for its app: fetched, checked, decoded (spec/device.md 8.3)."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec

from fedcompute.device.client.http import Transport
from fedcompute.errors import DeviceRunFailed, Reason

DOWNLOAD_BYTES_LIMIT = 20_000_000
SYNC_TOKEN_STEP = 3600

_LONG = (1 << 63) - 1


@dataclass(frozen=True)
class Download:
    """A file that counts: the token that names it, and its values by key."""

    sync_token: int
    contents: Mapping[str, bytes]


@dataclass(frozen=True)
class Discarded:
    """A file that does not count; what is stored stays. `why` holds nothing of the contents."""

    why: str


class _Item(msgspec.Struct, frozen=True):
    key: str | None = None
    data: str | None = None
    encoding: str | None = None


class _File(msgspec.Struct, frozen=True, rename="camel"):
    # A first data access stores 0, so a token below it could never follow.
    sync_token: Annotated[int, msgspec.Meta(ge=0, le=_LONG)]
    contents: tuple[_Item, ...] = ()


def parse_download(body: bytes, stored_sync_token: int | None) -> Download | Discarded:
    """The values of a downloaded file, by the rules of spec/device.md 8.3.

    Items without key or data, or in an encoding other than UTF-8 and base64, are skipped; of equal keys the last
    counts. The whole file is discarded for a sync token that is missing, no multiple of 3600 or not above the stored
    one, for contents without a usable item, for bad base64, and for anything that is not JSON of the right types.
    """
    try:
        file = msgspec.json.decode(body, type=_File)
    except msgspec.ValidationError as error:
        # Names a type and a place in the file, no value.
        return Discarded(f"not of the right types: {error}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Discarded(f"{len(body)} bytes that are no JSON")
    if file.sync_token % SYNC_TOKEN_STEP:
        return Discarded(f"sync token {file.sync_token} is no multiple of {SYNC_TOKEN_STEP}")
    if stored_sync_token is not None and file.sync_token <= stored_sync_token:
        return Discarded(f"sync token {file.sync_token} is not above {stored_sync_token}, the stored one")
    contents: dict[str, bytes] = {}
    for index, item in enumerate(file.contents):
        if item.key is None or item.data is None:
            continue
        match (item.encoding or "").strip().lower():
            case "" | "utf8":
                contents[item.key] = item.data.encode()
            case "base64":
                try:
                    contents[item.key] = base64.b64decode(item.data, validate=True)
                except (binascii.Error, ValueError):
                    return Discarded(f"item {index} is not base64")
    if not contents:
        return Discarded(f"no usable item among {len(file.contents)}")
    return Download(file.sync_token, contents)


async def fetch_download(transport: Transport, url: str, stored_sync_token: int | None) -> Download | Discarded:
    """Fetches the file at `url`, telling the stored token, and parses it; redirects as the transport follows them.

    Raises DeviceRunFailed: URL_NOT_ALLOWED, SERVER_UNREACHABLE, or SERVER_ANSWER_INVALID for a status other than 200
    and 201 and for more than 20 MB.
    """
    response = await transport.request(
        "GET", _with_token(url, stored_sync_token), what="vendor data", limit=DOWNLOAD_BYTES_LIMIT
    )
    if not response.ok:
        raise DeviceRunFailed(
            Reason.SERVER_ANSWER_INVALID,
            f"vendor data: the server answers {response.status}",
            remedy="check the manifest's download-settings",
        )
    return parse_download(response.body, stored_sync_token)


def _with_token(url: str, token: int | None) -> str:
    """As text, so that nothing else of the URL changes: its query may be signed."""
    if token is None:
        return url
    base = url.partition("#")[0]
    separator = "?" if "?" not in base else "" if base.endswith(("?", "&")) else "&"
    return f"{base}{separator}syncToken={token}"
