"""Two addresses of one server: the devices', and the operators'."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedcompute.errors import Reason
from fedcompute.server.api.guard import OPEN_PATHS
from fedcompute.server.settings import Settings

HEALTH = ("/ready", "/healthz")
_DEVICE_PATHS = tuple(path for path in OPEN_PATHS if path not in HEALTH)


class Addresses:
    """ASGI middleware: each address answers for its own routes, and for the rest as if there were none.

    Formal guarantees: where operators have a port of their own, a request that came in on another port reaches nothing
    but devices' routes and health. The port is that of the socket which took the connection; no header is looked at.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._port = settings.operator_port if settings.splits_operators else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._port is None or self._is_here(scope):
            await self._app(scope, receive, send)
            return
        document = {
            "code": Reason.NOT_FOUND.value,
            "message": "Not Found",
            "remedy": "check the method and path of the route",
        }
        await JSONResponse(document, status_code=404)(scope, receive, send)

    def _is_here(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if path in HEALTH:
            return True
        server = scope.get("server")
        is_operators = server is not None and server[1] == self._port
        return path.startswith(_DEVICE_PATHS) != is_operators
