"""A browser's session, opened with an API key and closed by its owner."""

from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedcompute.server.api.acts import audited, name_subject
from fedcompute.server.context import context_of, now
from fedcompute.server.security.limits import read_body
from fedcompute.server.security.operators import Caller, check_origin
from fedcompute.server.security.sessions import session_cookie, session_value
from fedcompute.storage.api_keys import verify_api_key

_FORM_LIMIT = 4096
_KEY_LIMIT = 256


async def sign_in(request: Request) -> Response:
    """Opens a session with the key in the form's field `key`, and leads to its field `next`.

    Raises RequestRejected: API_KEY_INVALID, REQUEST_TOO_LARGE, FOREIGN_ORIGIN.
    """
    check_origin(request.headers.get("host", ""), request.headers)
    form = parse_qs((await read_body(request, _FORM_LIMIT)).decode("utf-8", "replace"))
    key = form.get("key", [""])[0].strip()[:_KEY_LIMIT]
    cookie = await run_in_threadpool(_open, request, key)
    return RedirectResponse(local(form.get("next", ["/"])[0]), 303, headers={"set-cookie": cookie})


async def sign_out(request: Request) -> Response:
    """Closes the session."""
    check_origin(request.headers.get("host", ""), request.headers)
    cookie = session_cookie(context_of(request).settings, "")
    return RedirectResponse("/login", 303, headers={"set-cookie": cookie})


def local(address: str) -> str:
    """`address` if it is a path of this server, else `/`: a link to the sign-in page must not lead elsewhere."""
    odd = any(ord(sign) <= 32 or sign in "\\\x7f" for sign in address)
    return address if address.startswith("/") and not address.startswith("//") and not odd else "/"


def _open(request: Request, text: str) -> str:
    context = context_of(request)
    with context.database.read() as tx:
        key = verify_api_key(tx, text, now())
    request.state.caller = Caller(f"{key.id} ({key.label})", key.role)
    name_subject(request, key.id)
    with audited(request):
        return session_cookie(context.settings, session_value(context.session_key, key.id, now()))
