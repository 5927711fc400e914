"""What tells one training run from another: facts of configurations, and short names made of those that differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from fedcompute.errors import ArtifactInvalid
from fedcompute.protos import learning_pb2
from fedcompute.server.rounds.plans import read_server_plan

Fact = str | int | float
_PLAN_LIMIT = 512 << 20
# The configuration's own word for each aggregator (spec/task-builder.md 3).
_DP_TYPES = {
    "uniform_mean": "none",
    "weighted_mean": "none",
    "fixed_gaussian": "FIXED_GAUSSIAN",
    "adaptive_gaussian": "ADAPTIVE_GAUSSIAN",
    "tree_aggregation": "TREE_AGGREGATION",
    "adaptive_tree": "ADAPTIVE_TREE",
    "banded_mf": "BANDED_MF",
}


@dataclass(frozen=True)
class RunFacts:
    """One task and what its configuration says, in words and numbers."""

    population: str
    task_id: int
    facts: Mapping[str, Fact]

    def __str__(self) -> str:
        return f"{self.population}/{self.task_id}"


def facts_of_plan(plan: bytes) -> dict[str, Fact]:
    """The facts of a stored server plan, gzip or not; none of one that cannot be read."""
    try:
        return facts_of_process(read_server_plan(plan, _PLAN_LIMIT).process)
    except ArtifactInvalid:
        return {}


def facts_of_process(process: learning_pb2.LearningProcess) -> dict[str, Fact]:
    """The facts of a learning process; of one that runs as graphs its kind alone."""
    found: dict[str, Fact] = {}
    if process.kind:
        found["kind"] = learning_pb2.LearningProcess.Kind.Name(process.kind).lower()
    if process.algorithm:
        found["algorithm"] = learning_pb2.LearningProcess.Algorithm.Name(process.algorithm)
    for leaf in process.broadcasts:
        if leaf.HasField("constant"):
            found["client " + leaf.client_name.rpartition("/")[2].replace("_", " ")] = _short(leaf.constant)
    if optimizer := process.WhichOneof("server_optimizer"):
        found["server optimizer"] = optimizer.upper()
        found |= {f"server {name}": value for name, value in _numbers(getattr(process, optimizer)).items()}
    if aggregator := process.WhichOneof("aggregator"):
        found["DP type"] = _DP_TYPES[aggregator]
        found |= {
            name: value for name, value in _numbers(getattr(process, aggregator)).items() if name != "report goal"
        }
    if process.HasField("metric_noise"):
        found |= {f"metrics' {name}": value for name, value in _numbers(process.metric_noise).items()}
    return found


def differing(runs: Sequence[RunFacts]) -> list[str]:
    """The names of facts that are not the same in all runs, in the order of the first run that has them."""
    names = dict.fromkeys(name for run in runs for name in run.facts)
    return [name for name in names if len({str(run.facts.get(name)) for run in runs}) > 1]


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """A short name for each run, no two alike: what differs, else, or where that is not enough, the task."""
    names = [name for name in differing(runs) if name != "kind"][:3]
    told = [", ".join(f"{name} {run.facts[name]}" for name in names if name in run.facts) for run in runs]
    tasks = _tasks(runs)
    return [
        text if text and told.count(text) == 1 else f"{text} ({task})" if text else task
        for text, task in zip(told, tasks, strict=True)
    ]


def _tasks(runs: Sequence[RunFacts]) -> list[str]:
    one_population = len({run.population for run in runs}) == 1
    return [f"task {run.task_id}" if one_population and len(runs) > 1 else str(run) for run in runs]


def _numbers(message: Message) -> dict[str, Fact]:
    found: dict[str, Fact] = {}
    for field, value in message.ListFields():
        if isinstance(value, (int, float, str)):
            found[field.name.replace("_", " ")] = _short(value)
    return found


def _short(value: Fact) -> Fact:
    # A float32 that was written as 0.1 is 0.10000000149.
    return float(f"{value:.6g}") if isinstance(value, float) else value
