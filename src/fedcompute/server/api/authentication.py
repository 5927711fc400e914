"""What the authentication of devices has decided, over HTTP."""

from starlette.requests import Request
from starlette.responses import JSONResponse

from fedcompute.server.context import context_of


async def authentication(request: Request) -> JSONResponse:
    """Which devices are taken, and how often this server has decided what since it started.

    Refusals are counted by their reason, and apart from them the failures of an attestation service.
    """
    context = context_of(request)
    decisions = {} if context.authentication is None else context.authentication.counts.all()
    return JSONResponse({"devices": context.settings.authentication, "decisions": decisions})
