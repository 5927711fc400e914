"""A refusal or failure as a page."""

from http import HTTPStatus

from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, Response

from fedcompute.errors import FedComputeError
from fedcompute.monitoring.pages.rendering import PAGE_HEADERS, rendered


def error_page(request: HTTPConnection, error: FedComputeError) -> Response | None:
    """The error for a person at a browser, with the status that a program gets; None if the request wants no HTML."""
    if "text/html" not in request.headers.get("accept", ""):
        return None
    values = {
        "title": HTTPStatus(error.status).phrase,
        "message": error.detail,
        "remedy": error.remedy,
        "code": error.reason.value,
        "request_id": getattr(request.state, "request_id", ""),
    }
    return HTMLResponse(rendered(request, "error.html", values), status_code=error.status, headers=PAGE_HEADERS)
