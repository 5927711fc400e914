"""What the JSON answers of the management routes look like, as JSON Schema (draft 2020-12, the one of OpenAPI 3.1)."""

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": "string", "format": "date-time"}
OBJECT: Schema = {"type": "object"}
COUNTS: Schema = {"type": "object", "additionalProperties": {"type": "integer"}}
BINARY: Schema = {"type": "string", "format": "binary"}


def maybe(schema: Schema) -> Schema:
    """The schema, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema) -> Schema:
    """A list of what the schema describes."""
    return {"type": "array", "items": schema}


def record(**properties: Schema) -> Schema:
    """An object with all of these properties; answers may gain others in later releases."""
    return {"type": "object", "required": list(properties), "properties": properties}


def ref(name: str) -> Schema:
    """One of COMPONENTS by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def page(name: str, items: Schema) -> Schema:
    """A page of a long list."""
    return record(**{name: listed(items), "next": maybe(TEXT)})


def proto(name: str) -> Schema:
    """The JSON form of a message."""
    return {"type": "object", "description": f"The proto3 JSON form of `{name}` of task.proto, its field names kept."}


_TASK = {
    "population": TEXT,
    "task_id": INTEGER,
    "kind": TEXT,
    "status": TEXT,
    "total_iteration": INTEGER,
    "min_aggregation_size": INTEGER,
    "max_aggregation_size": INTEGER,
    "max_parallel": INTEGER,
    "min_client_version": TEXT,
    "max_client_version": TEXT,
    "traffic_weight": INTEGER,
    "info": OBJECT,
    "reason": maybe(TEXT),
    "created": TIME,
    "opened": maybe(TIME),
    "stopped": maybe(TIME),
    "entered": TIME,
    "start_no_earlier_than": maybe(TIME),
    "do_not_create_iteration_after": maybe(TIME),
}

COMPONENTS: Mapping[str, Schema] = {
    "Error": record(code=TEXT, message=TEXT, remedy=TEXT),
    "Task": record(**_TASK),
    "ListedTask": record(**_TASK, newest_iteration=maybe(ref("Iteration"))),
    "Iteration": record(
        iteration_id=INTEGER,
        attempt_id=INTEGER,
        status=TEXT,
        report_goal=INTEGER,
        max_aggregation_size=INTEGER,
        evaluated_iteration_id=maybe(INTEGER),
        assignments=COUNTS,
        opened=TIME,
        entered=TIME,
        expires=maybe(TIME),
        reason=maybe(TEXT),
        completed=maybe(TIME),
    ),
    "TaskView": record(
        task=ref("Task"),
        failure=maybe(ref("Error")),
        iterations=listed(ref("Iteration")),
        assignments=COUNTS,
        rejections=COUNTS,
        metrics=listed(record(iteration_id=INTEGER, name=TEXT, value=maybe(NUMBER))),
        ledger=listed(OBJECT),
    ),
    "RoundProgress": record(
        iteration_id=INTEGER,
        attempt_id=INTEGER,
        status=TEXT,
        seconds_in_status=NUMBER,
        seconds_open=NUMBER,
        report_goal=INTEGER,
        contributions=INTEGER,
        assignments=COUNTS,
        contributions_per_minute=maybe(NUMBER),
        expires=maybe(TIME),
    ),
    "Progress": record(
        population=TEXT,
        task_id=INTEGER,
        status=TEXT,
        reason=maybe(TEXT),
        seconds_in_status=NUMBER,
        rounds_completed=INTEGER,
        rounds_total=INTEGER,
        rounds=listed(ref("RoundProgress")),
        rounds_per_hour=maybe(NUMBER),
        seconds_left=maybe(NUMBER),
        last_release=maybe(TIME),
    ),
    "Artifact": record(name=TEXT, iteration_id=maybe(INTEGER), stored_bytes=INTEGER, path=TEXT),
    "Metric": record(iteration_id=INTEGER, name=TEXT, value=maybe(NUMBER), time=TIME),
    "Budget": record(epsilon=NUMBER, delta=NUMBER, assumption=TEXT),
    "Caller": record(actor=TEXT, role=TEXT),
    "ApiKey": record(id=TEXT, label=TEXT, role=TEXT, live=FLAG, created=TIME, expires=maybe(TIME), revoked=maybe(TIME)),
    "Enrolment": record(id=TEXT, label=TEXT, created=TIME, revoked=maybe(TIME)),
    "EncryptionKey": record(id=TEXT, published=FLAG, created=TIME, published_until=TIME, expires=TIME),
    "Act": record(
        id=TEXT, time=TIME, actor=TEXT, role=TEXT, action=TEXT, subject=TEXT, status=INTEGER, request_id=TEXT
    ),
}
