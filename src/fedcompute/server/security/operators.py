"""Who calls a management route: the holder of an API key, or this machine itself where no key is asked for.

Without a key a route is open only to a program on this machine that speaks to a server which listens on this machine's
own address alone. A browser is such a program too, and so is a proxy; neither may lend that trust to strangers:

- a public URL that is not this machine's means a proxy, and not every proxy leaves a trace in what it hands on;
- a Host header that names another machine means a proxy, or a web page whose name was pointed here (DNS rebinding);
- a header that proxies add means that the caller is somebody else;
- a change whose Origin is another page was not asked for by who sits at the browser.

Headers can therefore only take trust away. None gives it.
"""

import ipaddress
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.settings import Settings
from fedcompute.storage.api_keys import Role, count_live_api_keys, verify_api_key
from fedcompute.storage.database import Database

_LOG = logging.getLogger(__name__)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
KEY_HEADER = "x-api-key"
_KEY_LIMIT = 256
_OF_PROXIES = re.compile(r"forwarded|via|cdn-loop|x-real-ip|.*client-ip|(x-forwarded|x-original|x-envoy|cf-).*")
# What a host of a URL may be; parsers of whole URLs find a host also in what is none.
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_NEED_KEY = "management routes need an API key"


@dataclass(frozen=True)
class Caller:
    """Who calls, as the audit log names it, and what it may do."""

    actor: str
    role: Role


LOOPBACK = Caller("loopback", Role.OPERATOR)


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The API key that a request shows: `X-Api-Key`, else `Authorization: Bearer`; None if it shows none.

    The first one wins, so that a bearer token for a gateway in front of the server may travel beside a key. Raises
    RequestRejected(API_KEY_INVALID) for an Authorization header of another kind.
    """
    if (own := headers.get(KEY_HEADER)) is not None:
        return own.strip()[:_KEY_LIMIT]
    header = headers.get("authorization")
    if header is None:
        return None
    scheme, _, text = header.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise RequestRejected(Reason.API_KEY_INVALID, "the Authorization header is no bearer token")
    return text.strip()[:_KEY_LIMIT]


def identify(database: Database, settings: Settings, method: str, headers: Mapping[str, str], now: datetime) -> Caller:
    """Who makes a request; blocks for one look-up if it shows a key.

    Raises RequestRejected: API_KEY_MISSING, API_KEY_INVALID (a wrong key is refused also where none is needed) and
    FOREIGN_ORIGIN.

    Formal guarantees: a caller without a live key of this server is either refused or LOOPBACK; it is LOOPBACK only if
    operators' address is a loopback one, is not published elsewhere, keys are not demanded, and no header speaks
    against it. That a request came in on operators' address is for `Addresses` to see.
    """
    text = presented_key(headers)
    if text is not None:
        with database.read() as tx:
            key = verify_api_key(tx, text, now)
        return Caller(f"{key.id} ({key.label})", key.role)
    if not opens_without_key(settings):
        raise RequestRejected(Reason.API_KEY_MISSING, _NEED_KEY)
    host = headers.get("host", "")
    if not is_loopback(_name(host)):
        raise RequestRejected(Reason.API_KEY_MISSING, f"{_NEED_KEY} when the request names another machine as its host")
    if any(_OF_PROXIES.fullmatch(name) for name in headers):
        raise RequestRejected(Reason.API_KEY_MISSING, f"{_NEED_KEY} when they are called through a proxy")
    if method not in SAFE_METHODS:
        check_origin(host, headers)
    return LOOPBACK


def opens_without_key(settings: Settings) -> bool:
    """Whether this machine's own programs need no key: operators' address is a loopback one, and no key is demanded.

    A public URL elsewhere, and proxies that are trusted, say that strangers come by a program on this machine. The URL
    is the devices', and says nothing of an address that operators have to themselves; a proxy may front both.
    """
    if settings.require_api_keys or not is_loopback(settings.operator_address[0]):
        return False
    return not strangers_come(settings) or (settings.splits_operators and not settings.trusted_proxies)


def strangers_come(settings: Settings) -> bool:
    """Whether the devices' address can be reached by others than this machine's own programs."""
    own = settings.public_url is None or is_loopback(urlsplit(settings.public_url).hostname or "")
    return not own or bool(settings.trusted_proxies) or settings.require_api_keys or not is_loopback(settings.host)


def warn_if_locked(database: Database, settings: Settings, now: datetime) -> None:
    """Logs that no management call can succeed, if keys are asked for and there is none."""
    if opens_without_key(settings):
        return
    with database.read() as tx:
        live = count_live_api_keys(tx, now)
    if not live:
        _LOG.warning("there is no API key, so nobody can manage tasks; make one with `fedcompute api-key create`")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own; a name counts only if it can be nothing else."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def check_origin(host: str, headers: Mapping[str, str]) -> None:
    """Raises RequestRejected(FOREIGN_ORIGIN) if a browser says that a page of another origin makes the request."""
    origin = headers.get("origin")
    cross = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
    if cross or (origin is not None and origin not in (f"http://{host}", f"https://{host}")):
        raise RequestRejected(Reason.FOREIGN_ORIGIN, "a page of another origin may change nothing here")


def _name(host: str) -> str:
    found = _HOST.fullmatch(host)
    return "" if found is None else found["name"]
