"""The management API as one table: every route that is not a device's, who may call it, and what it answers.

The application's routes, the guard's roles, the audit log's actions and the OpenAPI document are all made from it.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from fedcompute.server.api import (
    api_keys,
    artifacts,
    audit,
    authentication,
    clones,
    encryption_keys,
    enrolments,
    health,
    measuring,
    metrics,
    openapi,
    overview,
    privacy,
    progress,
    tasks,
)
from fedcompute.server.api.messages import JSON, MEDIA_TYPE
from fedcompute.server.api.paths import TemplateRoute
from fedcompute.server.api.schemas import (
    BINARY,
    COUNTS,
    NUMBER,
    OBJECT,
    TEXT,
    Schema,
    listed,
    maybe,
    page,
    proto,
    record,
    ref,
)
from fedcompute.storage.api_keys import Role

VIEWER, BUILDER, OPERATOR = Role.VIEWER, Role.BUILDER, Role.OPERATOR
_OCTETS = "application/octet-stream"
_TASK = "/api/v1/tasks/{population}/{task}"
_MANAGED = "/taskmanagement/v1/population/{population}"
_POPULATION = "/api/v1/populations/{population}"
_BYTES: Mapping[str, Schema] = {_OCTETS: BINARY}

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    `name`: its name in the audit log and the OpenAPI document. `role`: the least that may call it; None: anybody.
    `changes`: whether it is in the audit log. `query`: name -> what it does. `body` and `answer`: media type -> schema.
    """

    method: str
    path: str
    endpoint: Endpoint
    name: str
    role: Role | None
    answer: Mapping[str, Schema]
    status: int = 200
    changes: bool = False
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Schema] = field(default_factory=dict)
    page: bool = False  # for a person at a browser


_PAGED = {"after": "the `next` of the page before", "limit": "how many entries a page may have"}
_STATUS = {"status": "only tasks of this status; may be repeated"}
_ROUND = {"iteration": "the round, 0 for what the task began with; the newest if left out"}
_CHANGED: Mapping[str, Schema] = {JSON: record(task=ref("Task")), MEDIA_TYPE: BINARY}
_MANAGED_TASK: Mapping[str, Schema] = {MEDIA_TYPE: BINARY, JSON: proto("GetTaskByIdResponse")}
_NEW_KEY = {
    "type": "object",
    "required": ["label", "role"],
    "properties": {"label": TEXT, "role": {"enum": [one.value for one in Role]}, "days": maybe(NUMBER)},
}

OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/healthz", health.healthz, "health", None, {"text/plain": TEXT}),
    Operation("GET", "/ready", health.ready, "ready", None, {"text/plain": TEXT}),
    Operation("GET", "/metrics", measuring.metrics, "metrics", VIEWER, {"text/plain": TEXT}),
    # Task management as the reference has it, and ours beside it.
    Operation(
        "POST",
        _MANAGED + ":create-task",
        tasks.create,
        "task.create",
        BUILDER,
        {MEDIA_TYPE: BINARY, JSON: proto("CreateTaskResponse")},
        changes=True,
        body={MEDIA_TYPE: BINARY, JSON: proto("CreateTaskRequest")},
    ),
    Operation("GET", _MANAGED + "/tasks/{task}:get", tasks.get, "task.get", VIEWER, _MANAGED_TASK),
    Operation(
        "POST", _MANAGED + "/tasks/{task}:cancel", tasks.cancel, "task.cancel", BUILDER, _MANAGED_TASK, changes=True
    ),
    Operation(
        "POST", _MANAGED + "/tasks/{task}:pause", tasks.pause, "task.pause", OPERATOR, _MANAGED_TASK, changes=True
    ),
    Operation(
        "POST", _MANAGED + "/tasks/{task}:resume", tasks.resume, "task.resume", OPERATOR, _MANAGED_TASK, changes=True
    ),
    # Tasks.
    Operation(
        "GET",
        "/api/v1/tasks",
        overview.tasks,
        "task.list",
        VIEWER,
        {JSON: page("tasks", ref("ListedTask"))},
        query={"population": "only tasks of this population", **_STATUS, **_PAGED},
    ),
    Operation("GET", _TASK, overview.task, "task.show", VIEWER, {JSON: ref("TaskView"), MEDIA_TYPE: BINARY}),
    Operation("POST", _TASK + "/cancel", tasks.cancel, "task.cancel", BUILDER, _CHANGED, changes=True),
    Operation("POST", _TASK + "/pause", tasks.pause, "task.pause", OPERATOR, _CHANGED, changes=True),
    Operation("POST", _TASK + "/resume", tasks.resume, "task.resume", OPERATOR, _CHANGED, changes=True),
    Operation(
        "POST",
        _TASK + "/clone",
        clones.clone,
        "task.clone",
        BUILDER,
        _CHANGED,
        status=201,
        changes=True,
        query={"from_iteration": "start from what this round released; the old task's first model if left out"},
    ),
    Operation("GET", _TASK + "/progress", progress.progress, "task.progress", VIEWER, {JSON: ref("Progress")}),
    Operation(
        "GET",
        _TASK + "/iterations",
        overview.iterations,
        "task.iterations",
        VIEWER,
        {JSON: page("iterations", ref("Iteration"))},
        query=_PAGED,
    ),
    Operation(
        "GET",
        _TASK + "/metrics",
        metrics.metrics,
        "task.metrics",
        VIEWER,
        {JSON: page("metrics", ref("Metric")), metrics.CSV: TEXT},
        query={**_PAGED, "format": "json or csv, in place of an Accept header"},
    ),
    # Artifacts.
    Operation(
        "GET",
        _TASK + "/artifacts",
        artifacts.artifacts,
        "artifact.list",
        VIEWER,
        {JSON: page("artifacts", ref("Artifact"))},
        query=_PAGED,
    ),
    Operation("GET", _TASK + "/plan", artifacts.plan, "artifact.plan", VIEWER, _BYTES),
    Operation("GET", _TASK + "/client-plan", artifacts.client_plan, "artifact.client_plan", VIEWER, _BYTES),
    Operation("GET", _TASK + "/checkpoint", artifacts.checkpoint, "artifact.checkpoint", VIEWER, _BYTES, query=_ROUND),
    Operation(
        "GET",
        _TASK + "/client-checkpoint",
        artifacts.client_checkpoint,
        "artifact.client_checkpoint",
        VIEWER,
        _BYTES,
        query=_ROUND,
    ),
    # Privacy.
    Operation("GET", _POPULATION + "/ledger", privacy.ledger, "ledger.show", VIEWER, {JSON: OBJECT}, query=_PAGED),
    Operation(
        "GET",
        _POPULATION + "/budget",
        privacy.budget,
        "budget.show",
        VIEWER,
        {JSON: record(budget=maybe(ref("Budget")))},
    ),
    Operation(
        "PUT",
        _POPULATION + "/budget",
        privacy.put_budget,
        "budget.set",
        OPERATOR,
        {JSON: record(budget=ref("Budget"))},
        changes=True,
        body={JSON: ref("Budget")},
    ),
    Operation(
        "DELETE",
        _POPULATION + "/budget",
        privacy.delete_budget,
        "budget.remove",
        OPERATOR,
        {JSON: record(budget={"type": "null"})},
        changes=True,
    ),
    # Who may call, and who did.
    Operation("GET", "/api/v1/caller", api_keys.caller, "caller.show", VIEWER, {JSON: ref("Caller")}),
    Operation(
        "GET",
        "/api/v1/api-keys",
        api_keys.api_keys,
        "api_key.list",
        OPERATOR,
        {JSON: record(api_keys={"type": "array", "items": ref("ApiKey")})},
    ),
    Operation(
        "POST",
        "/api/v1/api-keys",
        api_keys.create,
        "api_key.create",
        OPERATOR,
        {JSON: record(api_key=ref("ApiKey"), key=TEXT)},
        status=201,
        changes=True,
        body={JSON: _NEW_KEY},
    ),
    Operation(
        "DELETE",
        "/api/v1/api-keys/{key}",
        api_keys.revoke,
        "api_key.revoke",
        OPERATOR,
        {JSON: record(revoked=TEXT)},
        changes=True,
    ),
    Operation(
        "GET",
        "/api/v1/authentication",
        authentication.authentication,
        "authentication.show",
        VIEWER,
        {JSON: record(devices=TEXT, decisions=COUNTS)},
    ),
    Operation(
        "GET",
        "/api/v1/enrolments",
        enrolments.enrolments,
        "enrolment.list",
        OPERATOR,
        {JSON: page("enrolments", ref("Enrolment"))},
        query=_PAGED,
    ),
    Operation(
        "POST",
        "/api/v1/enrolments",
        enrolments.create,
        "enrolment.create",
        OPERATOR,
        {JSON: record(enrolments=listed(OBJECT))},
        status=201,
        changes=True,
        body={JSON: record(label=TEXT)},
    ),
    Operation(
        "DELETE",
        "/api/v1/enrolments/{enrolment}",
        enrolments.revoke,
        "enrolment.revoke",
        OPERATOR,
        {JSON: record(revoked=TEXT)},
        changes=True,
    ),
    Operation(
        "GET", "/api/v1/audit", audit.audit, "audit.list", OPERATOR, {JSON: page("acts", ref("Act"))}, query=_PAGED
    ),
    # What devices encrypt to.
    Operation(
        "GET",
        "/api/v1/encryption-keys",
        encryption_keys.encryption_keys,
        "encryption_key.list",
        VIEWER,
        {JSON: record(encryption_keys={"type": "array", "items": ref("EncryptionKey")})},
    ),
    Operation(
        "POST",
        "/api/v1/encryption-keys/rotate",
        encryption_keys.rotate,
        "encryption_key.rotate",
        OPERATOR,
        {JSON: record(encryption_key=ref("EncryptionKey"))},
        changes=True,
    ),
    Operation("GET", "/api/v1/openapi.json", openapi.document, "openapi", VIEWER, {JSON: OBJECT}),
)


def routes_of(operations: Iterable[Operation]) -> list[TemplateRoute]:
    """A route for each operation, in their order."""
    return [TemplateRoute(one.path, one.endpoint, methods=[one.method], name=one.name) for one in operations]


# A server that only works on rounds answers for its health and for nothing else.
routes = routes_of(one for one in OPERATIONS if one.role is not None and one.path != "/metrics")


class Table:
    """The operations of an application, found by their requests."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._found = tuple(zip(operations, routes_of(operations), strict=True))

    def operation_of(self, scope: Scope) -> Operation | None:
        """The operation that a request is for, and its path parameters in `scope`; None if the table has none."""
        for operation, route in self._found:
            match, child = route.matches(scope)
            if match is Match.FULL:
                scope["path_params"] = child["path_params"]
                return operation
        return None
