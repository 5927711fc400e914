"""The names of tasks, iterations, assignments and batches (spec/server.md 4.6)."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class TaskKey:
    """One task; its text is `{population}/{task}`."""

    population: str
    task_id: int

    def __str__(self) -> str:
        return f"{self.population}/{self.task_id}"


@dataclass(frozen=True, order=True)
class IterationKey:
    """One attempt of one round; its text is `{population}/{task}/{iteration}/{attempt}`."""

    population: str
    task_id: int
    iteration_id: int
    attempt_id: int = 0

    def __str__(self) -> str:
        return f"{self.population}/{self.task_id}/{self.iteration_id}/{self.attempt_id}"

    @property
    def task(self) -> TaskKey:
        return TaskKey(self.population, self.task_id)


@dataclass(frozen=True, order=True)
class AssignmentKey:
    """One device's participation; its text appends `/{session}` to the iteration's."""

    iteration: IterationKey
    session_id: str

    def __str__(self) -> str:
        return f"{self.iteration}/{self.session_id}"

    @property
    def task(self) -> TaskKey:
        return self.iteration.task


@dataclass(frozen=True, order=True)
class BatchKey:
    """One aggregation job; its text appends `/{batch}` to the iteration's."""

    iteration: IterationKey
    batch_id: str

    def __str__(self) -> str:
        return f"{self.iteration}/{self.batch_id}"

    @property
    def task(self) -> TaskKey:
        return self.iteration.task
