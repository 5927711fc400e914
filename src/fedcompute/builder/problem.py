"""What is wrong with a configuration: one record per problem, all of them in one error."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedcompute.errors import ConfigInvalid, Reason


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    `message` is the line that users and their scripts know, `path` the field's place in the tree
    (`policies.model_release_policy.dp_delta`), `value` what stands there, as Python prints it. `line` and `column`
    count from 1; 0 where the configuration did not come from a file.
    """

    message: str
    path: str
    value: str
    rule: str
    remedy: str
    line: int = 0
    column: int = 0

    @property
    def text(self) -> str:
        """The message unchanged, then place and remedy on a line of their own unless the message has them."""
        return self.message if self.column else f"{self.message}\n    {self.path}: {self.remedy}"


class ConfigProblems(ConfigInvalid):
    """A configuration with one or more problems; `problems` lists all of them, first rule first."""

    def __init__(self, reason: Reason, problems: Sequence[Problem], *, prefix: str = "") -> None:
        super().__init__(reason, prefix + "\n".join(problem.text for problem in problems))
        self.problems = tuple(problems)


def frame(key: str, value: object, entity: str, detail: str) -> str:
    """One validation message in the published frame (spec/task-builder.md 2)."""
    return f"[Invalid task config]: key `{key}` has a bad value: `{value}` in `{entity}`. {detail}"


def slip(line: int, column: int, rule: str, remedy: str, *, path: str = "", value: str = "") -> Problem:
    """A problem of the text itself, at its place."""
    return Problem(f"line {line}, column {column}: {rule}; {remedy}", path, value, rule, remedy, line, column)


def unreadable(*problems: Problem) -> ConfigProblems:
    """The error for a text that cannot be read."""
    return ConfigProblems(Reason.CONFIG_UNREADABLE, problems)
