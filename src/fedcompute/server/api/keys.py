"""The embedded key service (spec/server.md 7.2, spec/device.md 2.1)."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedcompute.crypto.keys import public_keys_json
from fedcompute.server.context import context_of, now
from fedcompute.server.security.keys import current_keys

PUBLIC_KEYS_PATH = "/.well-known/odp/v1/public-keys"


async def public_keys(request: Request) -> Response:
    """GET /.well-known/odp/v1/public-keys: every published key; devices remember them for `max-age` seconds."""
    context = context_of(request)
    keys = await run_in_threadpool(current_keys, context.database, context.settings, now())
    headers = {"cache-control": f"public, max-age={int(context.settings.key_max_age)}"}
    return Response(public_keys_json(keys), media_type="application/json", headers=headers)


routes = [Route(PUBLIC_KEYS_PATH, public_keys, methods=["GET"])]
