"""Check-ins and reports: what the server decides, as messages (spec/server.md 2.1-2.5, device.md 1.3-1.7)."""

import contextlib

from fedcompute.errors import FedComputeError, Reason, RequestRejected
from fedcompute.protos import eligibility_pb2, federatedcompute_pb2, task_assignments_pb2
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.spending import has_noise
from fedcompute.server.settings import RetryWindow, Settings
from fedcompute.storage import assignments
from fedcompute.storage.check_ins import DeclineKind
from fedcompute.storage.iterations import IterationRow, get_iteration
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.paths import GRADIENT, MODEL, client_checkpoint_path, client_only_plan_path, update_path
from fedcompute.storage.schema import AssignmentStatus, IterationStatus, TaskStatus
from fedcompute.storage.tasks import TaskRow, list_tasks

_GZIP = federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP
_Rejection = federatedcompute_pb2.RejectionReason
Result = task_assignments_pb2.ReportResultRequest.Result

# Both are part of the upload's signature; phones send them as they are.
UPLOAD_HEADERS = {"content-type": "application/octet-stream", "content-encoding": "gzip"}

DEVICE_FAILURES = {
    task_assignments_pb2.ReportResultRequest.FAILED: AssignmentStatus.LOCAL_FAILED,
    task_assignments_pb2.ReportResultRequest.NOT_ELIGIBLE: AssignmentStatus.LOCAL_NOT_ELIGIBLE,
    task_assignments_pb2.ReportResultRequest.FAILED_EXAMPLE_GENERATION: (
        AssignmentStatus.LOCAL_FAILED_EXAMPLE_GENERATION
    ),
    task_assignments_pb2.ReportResultRequest.FAILED_MODEL_COMPUTATION: (
        AssignmentStatus.LOCAL_FAILED_MODEL_COMPUTATION
    ),
    task_assignments_pb2.ReportResultRequest.FAILED_OPS_ERROR: AssignmentStatus.LOCAL_FAILED_OPS_ERROR,
}


def separations(context: Context, population: str) -> dict[TaskKey, int]:
    """How far apart two contributions of one device to each open task must be, in rounds; 0 for any number."""
    with context.database.read() as tx:
        open_tasks = list_tasks(tx, population=population, statuses=[TaskStatus.OPEN])
    found = {}
    for task in open_tasks:
        # A task whose plan cannot be read gives no work to a device that would have to be kept apart.
        with contextlib.suppress(FedComputeError):
            found[task.key] = _separation(_policies(context, task))
    return found


def _separation(info: eligibility_pb2.EligibilityTaskInfo) -> int:
    policies = [policy.min_sep_policy for policy in info.eligibility_policies if policy.HasField("min_sep_policy")]
    return max((max(1, policy.minimum_separation) for policy in policies), default=0)


def report_completed(
    context: Context, task: TaskKey, iteration_id: int, session_id: str, seconds: float
) -> task_assignments_pb2.ReportResultResponse:
    """Answers a success report: where to upload, or, if the round is closed, when to come back.

    Raises RequestRejected(ASSIGNMENT_NOT_ACTIVE) for an unknown session, and for one that timed out or failed while
    its round still collects; OperationFailed(STORAGE_FAILED), also if it took longer than `seconds`.
    """
    with context.database.write(seconds) as tx:
        row = assignments.hold_assignment(tx, task, iteration_id, session_id)
        if row is None:
            raise RequestRejected(Reason.ASSIGNMENT_NOT_ACTIVE, "there is no such assignment")
        iteration = get_iteration(tx, row.key.iteration)
        assert iteration is not None, "an assignment's foreign key is its iteration"
        collecting = iteration.status is IterationStatus.COLLECTING
        if not collecting:
            assignments.cancel_late(tx, row.key, now())
        elif not assignments.report_completed(tx, row.key, now()):
            raise RequestRejected(Reason.ASSIGNMENT_NOT_ACTIVE, f"the assignment is {row.status.name}")
    if not collecting:
        # Kinder than 404: the device drops its update without repeating the report or counting a failure.
        return task_assignments_pb2.ReportResultResponse(
            rejection_info=rejection(_Rejection.NO_TASK_AVAILABLE, context.settings.retry_no_task)
        )
    path = update_path(task, iteration.result_id, session_id)
    url = context.signed_url("PUT", GRADIENT, path, context.settings.signed_url_life, UPLOAD_HEADERS)
    return task_assignments_pb2.ReportResultResponse(
        upload_instruction=task_assignments_pb2.UploadInstruction(
            upload_location=url,
            extra_request_headers=UPLOAD_HEADERS | context.store_headers,
            compression_format=_GZIP,
        )
    )


def report_failed(
    context: Context, task: TaskKey, iteration_id: int, session_id: str, result: Result, seconds: float
) -> None:
    """Records a failure report; one about an unknown or finished session changes nothing. Raises as the above."""
    status = DEVICE_FAILURES.get(result)
    if status is None:
        return
    with context.database.write(seconds) as tx:
        row = assignments.hold_assignment(tx, task, iteration_id, session_id)
        if row is not None:
            assignments.report_failed(tx, row.key, status, now())


def rejection(
    reason: federatedcompute_pb2.RejectionReason.Enum, window: RetryWindow
) -> federatedcompute_pb2.RejectionInfo:
    """The friendly refusal: the device comes back within `window` and counts no failure."""
    message = federatedcompute_pb2.RejectionInfo(reason=reason)
    message.retry_window.delay_min.FromNanoseconds(round(window.minimum * 1e9))
    message.retry_window.delay_max.FromNanoseconds(round(window.maximum * 1e9))
    return message


def declined(settings: Settings, kind: DeclineKind) -> federatedcompute_pb2.RejectionInfo:
    """The refusal of a check-in (spec/server.md 2.3)."""
    match kind:
        case DeclineKind.VERSION_MISMATCH:
            return rejection(_Rejection.CLIENT_VERSION_MISMATCH, settings.retry_version_mismatch)
        case DeclineKind.NOT_ACTIVE:
            return rejection(_Rejection.NO_ACTIVE_TASK_EXISTS, settings.retry_no_active_task)
        case _:
            return rejection(_Rejection.NO_TASK_AVAILABLE, settings.retry_no_task)


def assignment_of_round(
    context: Context, iteration: IterationRow, task: TaskRow
) -> task_assignments_pb2.TaskAssignment:
    """What every device of a round is told from this second on; `name_session` adds the rest.

    Raises ArtifactInvalid or OperationFailed for a plan that cannot be read.
    """
    key = iteration.key
    return task_assignments_pb2.TaskAssignment(
        population_name=key.population,
        task_id=str(key.task_id),
        aggregation_id=str(key.iteration_id),
        task_name=f"/population/{key.population}/task/{key.task_id}",
        init_checkpoint=_resource(context, client_checkpoint_path(key.task, iteration.base_on_result_id)),
        plan=_resource(context, client_only_plan_path(key.task)),
        eligibility_task_info=_eligibility(context, task, key),
        example_selector=context.plans.example_selector(key.task),
    )


def name_session(
    assignment: task_assignments_pb2.TaskAssignment, session_id: str
) -> task_assignments_pb2.TaskAssignment:
    """A copy of a round's assignment for one session."""
    named = task_assignments_pb2.TaskAssignment()
    named.CopyFrom(assignment)
    named.assignment_id = session_id
    named.self_uri = f"{named.task_name}/aggregation/{named.aggregation_id}/task-assignment/{session_id}"
    return named


def _resource(context: Context, path: str) -> federatedcompute_pb2.Resource:
    # Plans and client checkpoints are stored as gzip when a task opens, and served with Content-Encoding: gzip.
    url = context.signed_url("GET", MODEL, path, context.settings.signed_url_life)
    return federatedcompute_pb2.Resource(uri=url, compression_format=_GZIP)


def _eligibility(context: Context, task: TaskRow, key: IterationKey) -> eligibility_pb2.EligibilityTaskInfo:
    info = _policies(context, task)
    for policy in info.eligibility_policies:
        if policy.HasField("min_sep_policy"):
            policy.min_sep_policy.current_index = key.iteration_id
    return info


def _policies(context: Context, task: TaskRow) -> eligibility_pb2.EligibilityTaskInfo:
    info = eligibility_pb2.EligibilityTaskInfo()
    if task.is_training:
        info.CopyFrom(task.info.training_info.eligibility_task_info)
    process = context.plans.server_plan(task.key).process
    if has_noise(process):
        # Noise hides one contribution of a device to a round, and the plan may claim more than its task says.
        least = max(1, process.privacy_claim.minimum_separation)
        told = [policy for policy in info.eligibility_policies if policy.HasField("min_sep_policy")]
        for policy in told or [info.eligibility_policies.add()]:
            policy.min_sep_policy.minimum_separation = max(least, policy.min_sep_policy.minimum_separation)
    return info
