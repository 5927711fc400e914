"""What the dashboard adds to the table of operations: pages for people, charts for the pages."""

from fedcompute.server.api.messages import JSON
from fedcompute.server.api.operations import Endpoint, Operation
from fedcompute.server.api.schemas import OBJECT, TEXT
from fedcompute.storage.api_keys import Role

_HTML = "text/html"


def page(path: str, endpoint: Endpoint, name: str, *, role: Role | None = Role.VIEWER) -> Operation:
    """A page that is looked at."""
    return Operation("GET", path, endpoint, f"page.{name}", role, {_HTML: TEXT}, page=True)


def chart(path: str, endpoint: Endpoint, name: str) -> Operation:
    """The numbers of a chart."""
    return Operation("GET", path, endpoint, f"chart.{name}", Role.VIEWER, {JSON: OBJECT, "text/csv": TEXT}, page=True)


def form(path: str, endpoint: Endpoint, name: str, role: Role | None) -> Operation:
    """What a button does; `name` is the act's in the audit log. The answer leads to a page."""
    return Operation("POST", path, endpoint, name, role, {_HTML: TEXT}, status=303, changes=True, page=True)
