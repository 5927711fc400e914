"""The process that trains: `python -m fedcompute.device.isolation.trainer_main DESCRIPTOR`."""

import tempfile

import msgspec

from fedcompute.device.isolation.child import enter
from fedcompute.device.isolation.messages import Train, Trained, TrainingFailed
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.errors import FedComputeError, Reason
from fedcompute.protos import plan_pb2


def main() -> None:
    """Confines itself, then computes what the device sends, one after the other, until the device lets go."""
    end, start = enter()
    tempfile.tempdir = start.writable[0]
    runner = PlanRunner(time_limit=start.seconds)
    while True:
        train = msgspec.msgpack.decode(end.receive(), type=Train)
        answer: Trained | TrainingFailed
        try:
            result = runner.run(plan_pb2.ClientOnlyPlan.FromString(train.plan), train.checkpoint, train.examples)
        except FedComputeError as error:
            answer = TrainingFailed(error.reason.value, error.detail, error.remedy)
        except MemoryError:
            detail = f"the computation needs more than {start.memory >> 20} MiB of memory"
            answer = TrainingFailed(Reason.TRAINING_ABORTED.value, detail, "")
        else:
            answer = Trained(result.update, result.example_count, result.example_bytes)
        end.send(answer)


if __name__ == "__main__":
    main()
