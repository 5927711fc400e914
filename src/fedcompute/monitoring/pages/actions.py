"""Buttons that change a task: first a question where something is lost, then the management API's own change."""

import json
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.monitoring.pages.rendering import plain_page
from fedcompute.monitoring.pages.table import form, page
from fedcompute.server.api import clones, tasks
from fedcompute.server.api.paths import task_key
from fedcompute.storage.api_keys import Role
from fedcompute.storage.keys import TaskKey

_TASK = "/tasks/{population}/{task}"


@dataclass(frozen=True)
class _Question:
    question: str
    consequence: str
    label: str
    danger: bool


_QUESTIONS = {
    "cancel": _Question(
        "Cancel task {key}?",
        "The round under way ends without a result and what its devices have trained is lost. Models that were "
        "released stay. A task that is canceled cannot go on; it can be cloned.",
        "Cancel the task",
        True,
    ),
    "clone": _Question(
        "Clone task {key}?",
        "A new task begins with this one's fields and artifacts, from its first model. It needs the place of an active "
        "task of this kind in the population, and spends privacy like any other.",
        "Clone the task",
        False,
    ),
}


def task_address(key: TaskKey) -> str:
    """The address of a task's page."""
    return f"/tasks/{quote(key.population, safe='')}/{key.task_id}"


async def ask(request: Request) -> Response:
    """The question before a change that loses or begins something."""
    key, verb = task_key(request), request.path_params["verb"]
    asked = _QUESTIONS.get(verb)
    if asked is None:
        raise RequestRejected(Reason.NOT_FOUND, "there is no such page")
    back = task_address(key)
    values = {
        "population": key.population,
        "task_id": key.task_id,
        "question": asked.question.format(key=key),
        "consequence": asked.consequence,
        "label": asked.label,
        "danger": asked.danger,
        "address": f"{back}/{verb}",
        "back": back,
    }
    return await plain_page(request, "confirm.html", values)


async def cancel(request: Request) -> Response:
    """Cancels the task."""
    await tasks.cancel(request)
    return _back(task_key(request))


async def pause(request: Request) -> Response:
    """Pauses the task."""
    await tasks.pause(request)
    return _back(task_key(request))


async def resume(request: Request) -> Response:
    """Resumes the task."""
    await tasks.resume(request)
    return _back(task_key(request))


async def clone(request: Request) -> Response:
    """Clones the task and leads to the new one."""
    answer = await clones.clone(request)
    task_id = json.loads(bytes(answer.body))["task"]["task_id"]
    return _back(TaskKey(task_key(request).population, task_id))


def _back(key: TaskKey) -> Response:
    return RedirectResponse(task_address(key), status_code=303)


operations = (
    page(_TASK + "/{verb}", ask, "question"),
    form(_TASK + "/cancel", cancel, "task.cancel", Role.BUILDER),
    form(_TASK + "/pause", pause, "task.pause", Role.OPERATOR),
    form(_TASK + "/resume", resume, "task.resume", Role.OPERATOR),
    form(_TASK + "/clone", clone, "task.clone", Role.BUILDER),
)
