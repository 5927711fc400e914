"""What leaves a device's hands sealed: tokens for surfaces and URLs of events (spec/device.md 7.2, 7.7)."""

import base64
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

import msgspec

from fedcompute.crypto.secret_box import open_secret, seal_secret
from fedcompute.device.developer.errors import Status
from fedcompute.device.isolation.worker_call import WorkerFailed
from fedcompute.device.owner import Owner
from fedcompute.errors import ArtifactInvalid

_SURFACE = b"fedcompute surface"
_EVENT = b"fedcompute event"
_URL_CHARACTERS = 1 << 20

_Sealed = TypeVar("_Sealed", bound=msgspec.Struct)


class Surface(msgspec.Struct, frozen=True):
    """What an app may have shown without seeing it: whose, for which app, of which request, with which keys."""

    owner: Owner
    app_package: str
    request_id: int
    keys: tuple[str, ...]


class Event(msgspec.Struct, frozen=True):
    """What an event URL carries: whose, its parameters, and how it is answered."""

    owner: str
    parameters: dict[str, Any]
    data: bytes | None
    mime_type: str | None


def seal_surface(key: bytes, surface: Surface) -> bytes:
    """A token that only this device reads.

    Formal guarantees: as `secret_box.seal_secret`; a token of a surface never opens as an event.
    """
    return base64.urlsafe_b64encode(seal_secret(key, msgspec.msgpack.encode(surface), _SURFACE))


def open_surface(key: bytes, token: bytes) -> Surface:
    """The surface of a token. Raises WorkerFailed (INTERNAL) for anything that this device did not make.

    Formal guarantees: as `secret_box.open_secret`.
    """
    return _open(key, token, _SURFACE, Surface)


def event_url(key: bytes, event: Event, destination: str | None) -> str:
    """An `odp://` URL; `destination`: where it leads, in clear, as browsers show it.

    Formal guarantees: as `secret_box.seal_secret`; the destination is not protected.
    """
    sealed = base64.urlsafe_b64encode(seal_secret(key, msgspec.msgpack.encode(event), _EVENT)).decode()
    return f"odp://localhost?e={sealed}" + (f"&r={quote(destination, safe='')}" if destination else "")


def open_event_url(key: bytes, url: str) -> tuple[Event, str | None]:
    """The event of a URL and where it leads. Raises WorkerFailed (INTERNAL) for a URL that this device did not make.

    Formal guarantees: as `secret_box.open_secret`.
    """
    if len(url) > _URL_CHARACTERS:
        raise _foreign(len(url))
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query, max_num_fields=2)
        (sealed,) = (text.encode() for text in query["e"])
    except (ValueError, KeyError):
        raise _foreign(len(url)) from None
    if (parts.scheme, parts.netloc) != ("odp", "localhost"):
        raise _foreign(len(url))
    return _open(key, sealed, _EVENT, Event), query.get("r", [None])[0]


def _open(key: bytes, token: bytes, context: bytes, kind: type[_Sealed]) -> _Sealed:
    try:
        return msgspec.msgpack.decode(open_secret(key, base64.urlsafe_b64decode(token), context), type=kind)
    except (ValueError, ArtifactInvalid):
        # Also what a release before this one sealed in another form.
        raise _foreign(len(token)) from None


def _foreign(size: int) -> WorkerFailed:
    return WorkerFailed(Status.INTERNAL, f"a token or event URL of {size} characters that this device did not make")
