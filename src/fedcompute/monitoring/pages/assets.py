"""Style sheet and scripts of the pages; Plotly's own comes out of its installed package."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.errors import Reason, RequestRejected

_OWN = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PLOTLY = "plotly.min.js"
# Their addresses carry the version, so a browser need not ask again.
_HEADERS = {"cache-control": "public, max-age=31536000, immutable", "x-content-type-options": "nosniff"}


async def asset(request: Request) -> Response:
    """One file by its name."""
    name = request.path_params["name"]
    packed = "gzip" in request.headers.get("accept-encoding", "")
    body = await run_in_threadpool(_asset, name, packed)
    if body is None:
        raise RequestRejected(Reason.NOT_FOUND, "there is no such file")
    headers = {**_HEADERS, "vary": "accept-encoding", **({"content-encoding": "gzip"} if packed else {})}
    return Response(body, media_type=_TYPES[Path(name).suffix], headers=headers)


@cache
def _asset(name: str, packed: bool) -> bytes | None:
    if name not in _names():
        return None
    data = (_plotly() if name == PLOTLY else _OWN / name).read_bytes()
    return gzip_bytes(data) if packed else data


def _plotly() -> Path:
    # Found, not imported: only this one file is wanted.
    found = find_spec("plotly")
    assert found is not None, "plotly is installed with this package"
    assert found.origin is not None
    return Path(found.origin).parent / "package_data" / PLOTLY


@cache
def _names() -> frozenset[str]:
    return frozenset({PLOTLY, *(file.name for file in _OWN.iterdir() if file.suffix in _TYPES)})
