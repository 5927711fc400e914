"""Signed URLs of our own blob routes: whoever holds one may read or write one object for a while (spec/server.md 8)."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from fedcompute.errors import Reason, RequestRejected

BLOB_PREFIX = "/blobs/v1"
# Population names travel unencoded, so every character that may stand in one stays as it is.
_SAFE = "/:@!$&'()*+,;=~"


@dataclass(frozen=True)
class Grant:
    """The right to `method` the object `path` of `bucket` until `expires` (seconds since 1970).

    `headers` are those, lower-case names, that the request must carry with exactly these values.
    """

    method: str
    bucket: str
    path: str
    expires: int
    headers: Mapping[str, str]


def sign_url(base_url: str, key: bytes, grant: Grant) -> str:
    """Returns the absolute URL that carries `grant` and its signature.

    Formal guarantees: HMAC-SHA256 over an unambiguous encoding of every field, so a URL holds for this method,
    object, expiry and header values only; assumes that `key` is secret and random (32 bytes).
    """
    query = {"expires": str(grant.expires)}
    if grant.headers:
        query["headers"] = ";".join(sorted(grant.headers))
    query["signature"] = _signature(key, grant)
    return f"{base_url}{BLOB_PREFIX}/{grant.bucket}/{quote(grant.path, safe=_SAFE)}?{urlencode(query, safe=';')}"


def check_url(
    key: bytes, *, method: str, bucket: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], now: float
) -> Grant:
    """Returns the grant that the URL of a request proves; `headers` are the request's, lower-case names.

    Raises RequestRejected(BAD_SIGNATURE | URL_EXPIRED). The comparison takes the same time for every wrong signature.
    """
    names = [name for name in query.get("headers", "").split(";") if name]
    # isdecimal admits digits of every script, int() too; the length bound keeps int() cheap.
    text = query.get("expires", "")
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise RequestRejected(Reason.BAD_SIGNATURE, f"the URL of {bucket} object carries no expiry")
    grant = Grant(method, bucket, path, int(text), {name: headers.get(name, "") for name in names})
    given = query.get("signature", "").encode("utf-8", "replace")
    if not hmac.compare_digest(given, _signature(key, grant).encode()):
        raise RequestRejected(Reason.BAD_SIGNATURE, f"the signature does not fit this {method} of a {bucket} object")
    if now > grant.expires:
        late = int(now) - grant.expires
        raise RequestRejected(Reason.URL_EXPIRED, f"the signed URL of a {bucket} object expired {late} s ago")
    return grant


def _signature(key: bytes, grant: Grant) -> str:
    fields = [grant.method, grant.bucket, grant.path, str(grant.expires)]
    for name in sorted(grant.headers):
        fields += [name, grant.headers[name]]
    # Length prefixes keep two different lists of fields from giving the same bytes.
    message = b"".join(len(data).to_bytes(4, "big") + data for data in (field.encode() for field in fields))
    return hmac.new(key, message, hashlib.sha256).hexdigest()
