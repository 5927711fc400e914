"""How a page is answered: a template filled in, an entity tag that changes when the page would, strict headers."""

import hashlib
import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from fedcompute import __version__
from fedcompute.monitoring.pages.charts import Chart
from fedcompute.monitoring.plots import metric_label
from fedcompute.server.security.operators import LOOPBACK, Caller
from fedcompute.storage.api_keys import Role

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
# No script but ours, no other host whatsoever. Plotly writes style elements of its own.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "private, no-cache",
}


async def live_page(
    request: Request,
    template: str,
    version: Callable[[], str],
    values: Callable[[], Mapping[str, Any]],
    *,
    threads: CapacityLimiter | None = None,
) -> Response:
    """A page that asks every second whether it has changed.

    `version` is cheap and returns another text whenever `values` would; 304 answers who has that version already. Both
    run on a thread; where `values` may take long, on one of `threads`.
    """
    tag = _tag(request, await run_in_threadpool(version))
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"etag": tag, **PAGE_HEADERS})

    def render() -> str:
        return rendered(request, template, {"tag": tag, **values()})

    return HTMLResponse(await to_thread.run_sync(render, limiter=threads), headers={"etag": tag, **PAGE_HEADERS})


async def plain_page(request: Request, template: str, values: Mapping[str, Any], status: int = 200) -> Response:
    """A page that stays as it is."""
    return HTMLResponse(rendered(request, template, values), status_code=status, headers=PAGE_HEADERS)


async def chart_answer(request: Request, chart: Callable[[], Chart]) -> Response:
    """A chart as JSON, or as CSV with `?format=csv`; `chart` runs on a thread."""
    found = await run_in_threadpool(chart)
    if request.query_params.get("format") == "csv":
        name = "".join(sign if sign.isalnum() else "_" for sign in found.title.lower())[:80]
        headers = {
            **PAGE_HEADERS,
            "content-disposition": f'attachment; filename="{name.encode("ascii", "ignore").decode()}.csv"',
        }
        return Response(found.table(), media_type="text/csv", headers=headers)
    answer = JSONResponse(found.document(), headers=PAGE_HEADERS)
    tag = f'"{hashlib.sha256(bytes(answer.body)).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"etag": tag, **PAGE_HEADERS})
    answer.headers["etag"] = tag
    return answer


def rendered(request: HTTPConnection, template: str, values: Mapping[str, Any]) -> str:
    """A template's text; every page knows who looks at it."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return (
        environment()
        .get_template(template)
        .render(
            caller=caller,
            signed_in=caller is not None and caller != LOOPBACK,
            may_build=caller is not None and caller.role.covers(Role.BUILDER),
            may_operate=caller is not None and caller.role.covers(Role.OPERATOR),
            path=request.url.path,
            version=__version__,
            **values,
        )
    )


@cache
def environment() -> "Environment":
    """The templates: every value escaped, every unknown name an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made: Any = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "quoted": lambda text: shlex.quote(str(text)),
        "segment": lambda text: quote(str(text), safe=""),
        "words": lambda text: str(text).lower().replace("_", " "),
        "metric": metric_label,
        "number": _number,
        "count": lambda value: f"{value:,}",
        "duration": duration,
        "time": _time,
        "stamp": lambda moment: moment.astimezone(UTC).isoformat(timespec="seconds"),
        "bytes": _bytes,
    }
    return made  # type: ignore[no-any-return]


def duration(seconds: float | None) -> str:
    """A duration as people read it, with the precision that they use."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"


def _tag(request: Request, version: str) -> str:
    caller: Caller | None = getattr(request.state, "caller", None)
    parts = (__version__, request.url.path, request.url.query, str(caller), version)
    return f'"{hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]}"'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _bytes(value: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError


def _time(moment: datetime | None) -> str:
    return "–" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
