"""Pages of long lists: `limit` says how long one may be, `after` is the `next` of the page before."""

import re
from dataclasses import dataclass

from starlette.requests import Request

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.api.paths import number

_CURSOR = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class Page:
    """What a request asks for: at most `limit` entries, those that follow `after` (None: from the beginning)."""

    after: str | None
    limit: int


def page_of(request: Request, *, usual: int, most: int) -> Page:
    """The page that a request asks for, `usual` entries if it says nothing.

    Raises RequestRejected(MALFORMED_REQUEST).
    """
    limit = number(request.query_params.get("limit", str(usual)), "limit")
    if not 1 <= limit <= most:
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"limit {limit} does not lie between 1 and {most}")
    after = request.query_params.get("after")
    if after is not None and not _CURSOR.fullmatch(after):
        raise bad_cursor()
    return Page(after, limit)


def bad_cursor() -> RequestRejected:
    """The refusal of an `after` that no page has had as its `next`."""
    return RequestRejected(
        Reason.MALFORMED_REQUEST, "after is no place in this list", remedy="send the `next` of a page"
    )
