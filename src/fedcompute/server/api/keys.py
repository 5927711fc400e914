"""The embedded key service (spec/server.md 7.2, spec/device.md 2.1)."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from fedcompute.crypto.keys import public_keys_json
from fedcompute.server.api.paths import TemplateRoute
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.security.keys import Publication, publication

PUBLIC_KEYS_PATH = "/.well-known/odp/v1/public-keys"


async def public_keys(request: Request) -> Response:
    """GET /.well-known/odp/v1/public-keys: every published key; devices remember them for `max-age` seconds."""
    context = context_of(request)
    found = await run_in_threadpool(_published, context)
    # No Age: the answer is made for this request.
    headers = {"cache-control": f"public, max-age={found.max_age}"}
    return Response(public_keys_json(found.keys), media_type="application/json", headers=headers)


def _published(context: Context) -> Publication:
    if context.key_list is not None:
        return context.key_list.publication()
    return publication(context.database, context.sealer, context.settings, now())


routes = [TemplateRoute(PUBLIC_KEYS_PATH, public_keys, methods=["GET"])]
