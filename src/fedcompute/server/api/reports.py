"""Result of a device's run (spec/server.md 1.4)."""

import time
from functools import partial

from starlette.requests import Request

from fedcompute.protos import task_assignments_pb2
from fedcompute.server.api.admission import REPORT_S, persistently
from fedcompute.server.api.device_auth import authenticate_report
from fedcompute.server.api.messages import ProtoResponse, read_proto
from fedcompute.server.api.paths import TemplateRoute, number, split_verb
from fedcompute.server.context import context_of
from fedcompute.server.rounds.assign import report_completed, report_failed
from fedcompute.server.security.limits import MESSAGE_LIMIT
from fedcompute.server.tracing import report_span
from fedcompute.storage.keys import IterationKey, TaskKey


async def report_result(request: Request) -> ProtoResponse:
    """PUT .../population/{population}/task/{task}/aggregation/{iteration}/task-assignment/{session}:report-result."""
    path = request.path_params
    session_id = split_verb(path["session"], "report-result")
    task = TaskKey(path["population"], number(path["task"], "task"))
    iteration_id = number(path["iteration"], "aggregation")
    message = await read_proto(request, task_assignments_pb2.ReportResultRequest, limit=MESSAGE_LIMIT)
    context = context_of(request)
    deadline = time.monotonic() + REPORT_S
    completed = message.result == task_assignments_pb2.ReportResultRequest.COMPLETED
    admitted = await authenticate_report(request, task, iteration_id, session_id, failed=not completed)
    if isinstance(admitted, ProtoResponse):
        request.state.outcome = "NOT_ADMITTED"
        return admitted
    result = _result_name(message.result)
    session = (context, task, iteration_id, session_id)
    left = deadline - time.monotonic()
    key = IterationKey(task.population, task.task_id, iteration_id)
    with report_span(context, key, result) as traced:
        if completed:
            answer = await persistently(left, context.report_threads, partial(report_completed, *session))
            traced["in_time"] = not answer.HasField("rejection_info")
        else:
            await persistently(left, context.report_threads, partial(report_failed, *session, message.result))
            answer = task_assignments_pb2.ReportResultResponse()
    request.state.outcome = result
    return ProtoResponse(answer)


def _result_name(result: int) -> str:
    # A number of a later protocol is as good as UNKNOWN.
    kinds = task_assignments_pb2.ReportResultRequest.Result
    return kinds.Name(kinds.ValueType(result)) if result in kinds.values() else "UNKNOWN"


routes = [
    TemplateRoute(
        "/taskassignment/v1/population/{population}/task/{task}/aggregation/{iteration}/task-assignment/{session}",
        report_result,
        methods=["PUT"],
    ),
]
