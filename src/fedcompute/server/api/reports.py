"""Result of a device's run (spec/server.md 1.4)."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from fedcompute.protos import task_assignments_pb2
from fedcompute.server.api.messages import ProtoResponse, read_proto
from fedcompute.server.api.paths import number, split_verb
from fedcompute.server.context import context_of
from fedcompute.server.rounds.assign import report_completed, report_failed
from fedcompute.server.security.limits import MESSAGE_LIMIT
from fedcompute.storage.keys import TaskKey


async def report_result(request: Request) -> ProtoResponse:
    """PUT .../population/{population}/task/{task}/aggregation/{iteration}/task-assignment/{session}:report-result."""
    path = request.path_params
    session_id = split_verb(path["session"], "report-result")
    task = TaskKey(path["population"], number(path["task"], "task"))
    iteration_id = number(path["iteration"], "aggregation")
    message = await read_proto(request, task_assignments_pb2.ReportResultRequest, limit=MESSAGE_LIMIT)
    context = context_of(request)
    if message.result == task_assignments_pb2.ReportResultRequest.COMPLETED:
        answer = await run_in_threadpool(report_completed, context, task, iteration_id, session_id)
        return ProtoResponse(answer)
    await run_in_threadpool(report_failed, context, task, iteration_id, session_id, message.result)
    return ProtoResponse(task_assignments_pb2.ReportResultResponse())


routes = [
    Route(
        "/taskassignment/v1/population/{population}/task/{task}/aggregation/{iteration}/task-assignment/{session}",
        report_result,
        methods=["PUT"],
    ),
]
