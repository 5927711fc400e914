"""Parts of request paths: names that may hold colons, verbs, numbers (spec/server.md 1.1)."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Scope

from fedcompute.errors import Reason, RequestRejected
from fedcompute.storage.keys import TaskKey

_LARGEST = 2**63 - 1


class TemplateRoute(Route):
    """A route that says in the scope, as `template`, which template a path has matched."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return match, {**child, "template": self.path} if match is Match.FULL else child


def split_verb(segment: str, verb: str) -> str:
    """Returns what stands before the last `:verb` of a path's last segment; 404 for another verb or nothing before."""
    name, colon, found = segment.rpartition(":")
    if not colon or found != verb or not name:
        raise HTTPException(404, "no such path")
    return name


def number(text: str, what: str) -> int:
    """Returns a non-negative 64-bit integer of a path or query; raises RequestRejected(MALFORMED_REQUEST)."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text) <= _LARGEST):
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"{what} {text[:40]!r} is not a number")
    return int(text)


def task_key(request: Request) -> TaskKey:
    """The task that a path names by `{population}` and `{task}`; raises RequestRejected(MALFORMED_REQUEST)."""
    return TaskKey(str(request.path_params["population"]), number(request.path_params["task"], "task"))
