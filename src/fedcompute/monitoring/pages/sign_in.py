"""The page at which a browser shows an API key, once."""

from starlette.requests import Request
from starlette.responses import Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.monitoring.pages.rendering import plain_page
from fedcompute.monitoring.pages.table import form, page
from fedcompute.server.api.sessions import local, sign_in, sign_out


async def sign_in_page(request: Request) -> Response:
    """Asks for an API key; `?next=` says where to go then."""
    return await plain_page(
        request, "login.html", {"next": local(request.query_params.get("next", "/")), "problem": ""}
    )


async def sign_in_form(request: Request) -> Response:
    """Opens the session, or asks again."""
    try:
        return await sign_in(request)
    except RequestRejected as error:
        if error.reason is not Reason.API_KEY_INVALID:
            raise
        return await plain_page(request, "login.html", {"next": "/", "problem": error.detail}, status=error.status)


operations = (
    page("/login", sign_in_page, "sign_in", role=None),
    form("/login", sign_in_form, "session.open", None),
    form("/logout", sign_out, "session.close", None),
)
