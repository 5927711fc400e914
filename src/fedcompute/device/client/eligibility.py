"""Whether a device takes part in an assignment: the server's policies, evaluated here (spec/device.md 4)."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fedcompute.device.developer.worker import TrainingExampleRecord
from fedcompute.device.state.history import Participation
from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import eligibility_pb2

Query = Callable[[int], Awaitable[tuple[TrainingExampleRecord, ...]]]
"""Asks the worker for at least so many examples; raises DeviceRunFailed (EXAMPLES_FAILED) if there are fewer."""


@dataclass(frozen=True)
class Eligible:
    """`records`: what the data availability policy found, to be trained on; None where nothing was asked yet."""

    records: tuple[TrainingExampleRecord, ...] | None


@dataclass(frozen=True)
class NotEligible:
    """`policy` is the id of the first policy that failed, `why` the numbers."""

    policy: str
    why: str


async def evaluate(
    info: eligibility_pb2.EligibilityTaskInfo, newest: Participation | None, query: Query
) -> Eligible | NotEligible:
    """Evaluates policies in order, up to the first that fails; no policies, eligible.

    `newest`: the device's latest contribution to this very task. Raises DeviceRunFailed (SERVER_ANSWER_INVALID) for
    a policy of a kind that is not known.
    """
    records: tuple[TrainingExampleRecord, ...] | None = None
    for policy in info.eligibility_policies:
        match policy.WhichOneof("policy_type"):
            case "min_sep_policy":
                rounds = policy.min_sep_policy
                if newest is not None and rounds.current_index - newest.round < rounds.minimum_separation:
                    passed = rounds.current_index - newest.round
                    return NotEligible(
                        policy.id, f"{passed} rounds since the last contribution, not {rounds.minimum_separation}"
                    )
            case "data_availability_policy":
                try:
                    records = await query(policy.data_availability_policy.min_example_count)
                except DeviceRunFailed as error:
                    return NotEligible(policy.id, error.detail)
            case _:
                raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"an eligibility policy {policy.id!r} of no kind")
    return Eligible(records)


def round_index(info: eligibility_pb2.EligibilityTaskInfo) -> int:
    """The index that a contribution is remembered under: that of the first separation policy, 0 without one."""
    for policy in info.eligibility_policies:
        if policy.WhichOneof("policy_type") == "min_sep_policy":
            return policy.min_sep_policy.current_index
    return 0
