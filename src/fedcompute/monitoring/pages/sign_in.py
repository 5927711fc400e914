"""The page at which a browser shows an API key, once."""

from starlette.requests import Request
from starlette.responses import Response

from fedcompute.monitoring.pages.rendering import plain_page
from fedcompute.monitoring.pages.table import page


async def sign_in_page(request: Request) -> Response:
    """Asks for an API key; `?next=` says where to go then."""
    following = request.query_params.get("next", "/")
    return await plain_page(request, "login.html", {"next": following, "problem": ""})


operations = (page("/login", sign_in_page, "sign_in", role=None),)
