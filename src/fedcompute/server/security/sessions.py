"""Browser sessions: a person shows an API key once, and the browser keeps a cookie that stands for it.

The cookie names the key and when it was shown, under an authentication code of a secret that all servers of a database
share. It never holds the key, and the key is looked up again at every request, so that its end is the session's end.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from datetime import datetime, timedelta

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.security.operators import SAFE_METHODS, Caller, check_origin
from fedcompute.server.settings import Settings
from fedcompute.storage.api_keys import live_api_key
from fedcompute.storage.database import Database

LIFE = timedelta(hours=12)
_NAME = "fedcompute_session"
_VALUE = re.compile(r"(?P<id>[0-9a-f]{12})\.(?P<since>[0-9]{1,12})\.(?P<code>[0-9a-f]{64})")
_LONGEST_HEADER = 8192


def session_value(secret: bytes, key_id: str, now: datetime) -> str:
    """What the cookie of a session holds that begins now, with the key of that id."""
    since = int(now.timestamp())
    return f"{key_id}.{since}.{_code(secret, key_id, since)}"


def session_cookie(settings: Settings, value: str) -> str:
    """The Set-Cookie header for a session; an empty value ends it."""
    life = int(LIFE.total_seconds()) if value else 0
    secure = "; Secure" if _is_secure(settings) else ""
    return f"{_name(settings)}={value}; Path=/; Max-Age={life}; HttpOnly; SameSite=Strict{secure}"


def caller_of_session(
    database: Database, settings: Settings, secret: bytes, method: str, headers: Mapping[str, str], now: datetime
) -> Caller | None:
    """Who a request's session stands for; None without a session, or with one that is over. Names are lower case.

    Raises RequestRejected(FOREIGN_ORIGIN) for a change that a page of another origin asked for.

    Formal guarantees: a caller is returned only for a value made by `session_value` with this secret within the last
    twelve hours, for a key that is live now, with the role that the key has now. A change is let through only if the
    browser says that a page of this origin asked for it; codes compare in constant time.
    """
    found = _VALUE.fullmatch(_cookie(headers, _name(settings)))
    if found is None:
        return None
    since = int(found["since"])
    if not hmac.compare_digest(found["code"], _code(secret, found["id"], since)):
        return None
    if not timedelta() <= now - datetime.fromtimestamp(since, now.tzinfo) + timedelta(seconds=1) <= LIFE:
        return None
    with database.read() as tx:
        key = live_api_key(tx, found["id"], now)
    if key is None:
        return None
    if method not in SAFE_METHODS:
        if "origin" not in headers and "sec-fetch-site" not in headers:
            raise RequestRejected(Reason.FOREIGN_ORIGIN, "the browser does not say which page asked for the change")
        check_origin(headers.get("host", ""), headers)
    return Caller(f"{key.id} ({key.label})", key.role)


def _code(secret: bytes, key_id: str, since: int) -> str:
    return hmac.new(secret, f"fedcompute session 1\n{key_id}\n{since}".encode(), hashlib.sha256).hexdigest()


def _cookie(headers: Mapping[str, str], name: str) -> str:
    text = headers.get("cookie", "")
    if len(text) > _LONGEST_HEADER:
        return ""
    # Not the library's reader: it gives up at the first cookie that it dislikes, which may be another program's.
    pairs = (one.partition("=") for one in text.split(";"))
    return next((value.strip() for found, _, value in pairs if found.strip() == name), "")


def _name(settings: Settings) -> str:
    # A browser takes a cookie of this name only from the host itself, over TLS.
    return f"__Host-{_NAME}" if _is_secure(settings) else _NAME


def _is_secure(settings: Settings) -> bool:
    if settings.splits_operators:
        return settings.tls_certificate is not None
    return settings.base_url.startswith("https://")
