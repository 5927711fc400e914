"""The OpenAPI 3.1 document of the management API, made from the table of its operations."""

import inspect
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from fedcompute import __version__
from fedcompute.server.api.schemas import COMPONENTS, INTEGER, TEXT, ref

if TYPE_CHECKING:
    from fedcompute.server.api.operations import Operation

_PARAMETER = re.compile(r"{(\w+)}")
_NUMBERS = ("task", "limit", "iteration", "from_iteration")
_ABOUT = (
    "Tasks of a federated compute server, what they released, and who may change them. Devices speak another protocol, "
    "which is not in this document. Errors are JSON objects with a stable `code`, what happened, and what to do."
)


async def document(request: Request) -> JSONResponse:
    """This document."""
    from fedcompute.server.api.operations import OPERATIONS

    return JSONResponse(describe(OPERATIONS))


def describe(operations: "Iterable[Operation]") -> dict[str, Any]:
    """The OpenAPI document of operations."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "fedcompute management API", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": dict(COMPONENTS),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, `fc_...`."},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "The same key."},
            },
        },
    }


def _operation(operation: "Operation") -> dict[str, Any]:
    words = inspect.getdoc(operation.endpoint) or operation.name
    role = operation.role
    found: dict[str, Any] = {
        # A name may serve two paths; an id may not.
        "operationId": f"{operation.name}{'.managed' if operation.path.startswith('/taskmanagement') else ''}",
        "summary": words.partition("\n")[0],
        "description": words + ("" if role is None else f"\n\nNeeds the role {role.value}."),
        "tags": [operation.name.partition(".")[0]],
        "parameters": [*_path_parameters(operation.path), *_query_parameters(operation)],
        "responses": {
            str(operation.status): {"description": "Done.", "content": _content(operation.answer)},
            "default": {"description": "Refused or failed.", "content": _content({"application/json": ref("Error")})},
        },
        "security": [] if role is None else [{"bearer": []}, {"header": []}],
    }
    if operation.body:
        found["requestBody"] = {"required": True, "content": _content(operation.body)}
    if role is not None:
        found["x-role"] = role.value
    return found


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": INTEGER if name in _NUMBERS else TEXT}
        for name in _PARAMETER.findall(path)
    ]


def _query_parameters(operation: "Operation") -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": text,
            "schema": {"type": "array", "items": TEXT} if name == "status" else INTEGER if name in _NUMBERS else TEXT,
        }
        for name, text in operation.query.items()
    ]


def _content(schemas: Any) -> dict[str, Any]:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}
