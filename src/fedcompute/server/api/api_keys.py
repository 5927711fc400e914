"""API keys over HTTP, for operators who have no prompt on the server's own machine; and who a key belongs to."""

from datetime import datetime, timedelta
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.api.acts import audited, caller_of, name_subject
from fedcompute.server.api.messages import read_document
from fedcompute.server.context import context_of, now
from fedcompute.storage.api_keys import ApiKey, Role, create_api_key, list_api_keys, revoke_api_key

_LIMIT = 4096
_LONGEST_DAYS = 3650


async def caller(request: Request) -> JSONResponse:
    """Who the caller is to this server, and its role."""
    found = caller_of(request)
    return JSONResponse({"actor": found.actor, "role": found.role.value})


async def api_keys(request: Request) -> JSONResponse:
    """Every API key, without its secret."""
    return JSONResponse({"api_keys": await run_in_threadpool(_listed, request)})


async def create(request: Request) -> JSONResponse:
    """Makes an API key: `{"label": L, "role": R, "days": D}`, D optional; only this answer holds its text."""
    document = await read_document(request, limit=_LIMIT)
    key, text = await run_in_threadpool(_create, request, *_wanted(document))
    headers = {"cache-control": "no-store"}
    return JSONResponse({"api_key": key_document(key, now()), "key": text}, status_code=201, headers=headers)


async def revoke(request: Request) -> JSONResponse:
    """Ends an API key at once and for good; 404 if there is no live one of that id."""
    await run_in_threadpool(_revoke, request, str(request.path_params["key"]))
    return JSONResponse({"revoked": request.path_params["key"]})


def key_document(key: ApiKey, moment: datetime) -> dict[str, Any]:
    """A key as JSON, without its secret."""
    return {
        "id": key.id,
        "label": key.label,
        "role": key.role.value,
        "live": key.is_live(moment),
        "created": key.created.isoformat(),
        "expires": key.expires.isoformat() if key.expires else None,
        "revoked": key.revoked.isoformat() if key.revoked else None,
    }


def _listed(request: Request) -> list[dict[str, Any]]:
    with context_of(request).database.read() as tx:
        return [key_document(key, now()) for key in list_api_keys(tx)]


def _wanted(document: dict[str, Any]) -> tuple[Role, str, float | None]:
    label, role, days = document.get("label"), document.get("role"), document.get("days")
    known = [one.value for one in Role]
    if not isinstance(label, str) or role not in known:
        raise _refused(f"a key needs a label and one of the roles {', '.join(known)}")
    if days is None:
        return Role(role), label, None
    if isinstance(days, bool) or not isinstance(days, (int, float)) or not 0 < days <= _LONGEST_DAYS:
        raise _refused(f"days must be a number above 0 and at most {_LONGEST_DAYS}")
    return Role(role), label, float(days)


def _create(request: Request, role: Role, label: str, days: float | None) -> tuple[ApiKey, str]:
    moment = now()
    expires = None if days is None else moment + timedelta(days=days)
    with audited(request) as tx:
        key, text = create_api_key(tx, role, label, moment, expires=expires)
        name_subject(request, f"{key.id} ({key.label}) {role.value}")
    return key, text


def _revoke(request: Request, key_id: str) -> None:
    with audited(request) as tx:
        if not revoke_api_key(tx, key_id, now()):
            raise RequestRejected(Reason.NOT_FOUND, "there is no live API key of that id")


def _refused(detail: str) -> RequestRejected:
    return RequestRejected(Reason.MALFORMED_REQUEST, detail, remedy="correct what the message names")
