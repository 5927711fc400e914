"""The server's operator API (`/api/v1`), asked from a prompt, a plot or a test."""

import json
import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import quote

from fedcompute.errors import CATALOGUE, OperationFailed, Reason
from fedcompute.protos import task_pb2

_DOCUMENT_LIMIT = 256 << 20
_ARTIFACT_LIMIT = 1 << 30
_ENTRIES_LIMIT = 1_000_000
_LONGEST_PAGE = 1000
_PAGES_LIMIT = 10_000
_TIMEOUT = 30.0
_KEY = re.compile(r"[\x21-\x7e]{1,256}")
_ACTIVE = (task_pb2.TaskStatus.CREATED, task_pb2.TaskStatus.OPEN, task_pb2.TaskStatus.PAUSED)


class OperatorApi:
    """One server by its URL. Methods block; every answer has a size limit.

    Methods raise OperationFailed: SERVER_UNREACHABLE, SERVER_ANSWER_INVALID for what no server of ours would say, and
    the server's own reason, words and remedy where it refuses.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`api_key` is sent with every request, and shown in no error; None for a server that asks for none.

        Raises OperationFailed: URL_NOT_ALLOWED, and SETTINGS_INVALID for a text that is no key.
        """
        if not url.startswith(("http://", "https://")):
            raise OperationFailed(
                Reason.URL_NOT_ALLOWED, f"{url!r} is no server URL", remedy="write it as http://host:port"
            )
        if api_key is not None and not _KEY.fullmatch(api_key):
            raise OperationFailed(
                Reason.SETTINGS_INVALID,
                "the API key is no key",
                remedy="give the one line that `api-key create` printed",
            )
        self.url = url.rstrip("/")
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}

    def caller(self) -> dict[str, Any]:
        """Who this client is to the server: `actor` and `role`."""
        return self._document("/api/v1/caller", {})

    def tasks(self, population: str | None = None) -> list[dict[str, Any]]:
        """Every task with its newest round, or those of one population."""
        query = {} if population is None else {"population": population}
        return list(self._pages("/api/v1/tasks", query, "tasks", _LONGEST_PAGE))

    def task(self, population: str, task_id: int) -> dict[str, Any]:
        """One task: `task`, `iterations`, `assignments`, `rejections`, `metrics`, `ledger`, `failure`."""
        document = self._document(_task_path(population, task_id), {})
        if not isinstance(document.get("task"), dict):
            raise self._invalid("it holds no task")
        for name in ("iterations", "metrics", "ledger"):
            self._listed(document, name)
        return document

    def metrics(self, population: str, task_id: int) -> dict[int, dict[str, float | None]]:
        """Metrics by round, then name; None where a result was not finite."""
        found: dict[int, dict[str, float | None]] = {}
        # A page is so many rounds, measured or not.
        for row in self._pages(f"{_task_path(population, task_id)}/metrics", {}, "metrics", _LONGEST_PAGE, gaps=True):
            value = row.get("value")
            number = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
            found.setdefault(int(row["iteration_id"]), {})[str(row["name"])] = number
        return found

    def checkpoint(self, population: str, task_id: int, iteration: int | None = None) -> tuple[bytes, int]:
        """A released server checkpoint and its round; 0 is the initial one, None the newest."""
        query = {} if iteration is None else {"iteration": str(iteration)}
        data, headers = self._ask("GET", f"{_task_path(population, task_id)}/checkpoint", query, _ARTIFACT_LIMIT)
        found = str(headers.get("x-iteration", ""))
        if not found.isdecimal():
            raise self._invalid("it does not say of which round the checkpoint is")
        return data, int(found)

    def plan(self, population: str, task_id: int) -> bytes:
        """The server plan, serialized."""
        return self._ask("GET", f"{_task_path(population, task_id)}/plan", {}, _ARTIFACT_LIMIT)[0]

    def ledger(self, population: str) -> dict[str, Any]:
        """The whole ledger of a population as one document: `version`, `population`, `entries`, `budget`, `tasks`."""
        path = f"{_population_path(population)}/ledger"
        document = self._document(path, {})
        entries = self._listed(document, "entries")
        page = document
        while (after := page.pop("next", None)) is not None:
            page = self._document(path, {"after": str(after)})
            more = self._listed(page, "entries")
            if not more or len(entries) > _ENTRIES_LIMIT:
                raise self._invalid("its pages do not end")
            entries += more
        return {**page, "entries": entries}

    def budget(self, population: str) -> dict[str, Any] | None:
        """The population's budget: `epsilon`, `delta`, `assumption`; None if nothing limits it."""
        return self._budget(self._document(f"{_population_path(population)}/budget", {}))

    def set_budget(self, population: str, epsilon: float, delta: float, assumption: str) -> dict[str, Any] | None:
        """Gives the population a budget, from its next release on, and returns it."""
        body = {"epsilon": epsilon, "delta": delta, "assumption": assumption}
        path = f"{_population_path(population)}/budget"
        return self._budget(self._parsed(self._ask("PUT", path, {}, _DOCUMENT_LIMIT, body)[0]))

    def remove_budget(self, population: str) -> None:
        """Takes the population's budget away; NOT_FOUND if it has none."""
        self._ask("DELETE", f"{_population_path(population)}/budget", {}, _DOCUMENT_LIMIT)

    def progress(self, population: str, task_id: int) -> dict[str, Any]:
        """How far a task is: `status`, `rounds` under way, `rounds_completed`, `rounds_per_hour`, `seconds_left`."""
        return self._document(f"{_task_path(population, task_id)}/progress", {})

    def artifacts(self, population: str, task_id: int) -> list[dict[str, Any]]:
        """What may be downloaded: `name`, `iteration_id`, `stored_bytes`, `path` of each."""
        return list(self._pages(f"{_task_path(population, task_id)}/artifacts", {}, "artifacts", _LONGEST_PAGE))

    def clone(self, population: str, task_id: int, from_iteration: int | None = None) -> dict[str, Any]:
        """A new task with the fields and artifacts of an old one; from round N's model with `from_iteration`."""
        path = f"{_task_path(population, task_id)}/clone"
        query = {} if from_iteration is None else {"from_iteration": str(from_iteration)}
        found = self._parsed(self._ask("POST", path, query, _DOCUMENT_LIMIT)[0]).get("task")
        if not isinstance(found, dict):
            raise self._invalid("it holds no task")
        return found

    def audit(self, limit: int) -> list[dict[str, Any]]:
        """The newest `limit` acts of the audit log, newest first."""
        return list(islice(self._pages("/api/v1/audit", {}, "acts", min(limit, _LONGEST_PAGE)), limit))

    def encryption_keys(self) -> list[dict[str, Any]]:
        """The server's encryption keys, newest first: `id`, `published`, `created`, `published_until`, `expires`."""
        return self._listed(self._document("/api/v1/encryption-keys", {}), "encryption_keys")

    def rotate_encryption_keys(self) -> dict[str, Any]:
        """Publishes a fresh encryption key in place of all others, and returns it."""
        answer, _ = self._ask("POST", "/api/v1/encryption-keys/rotate", {}, _DOCUMENT_LIMIT)
        found = self._parsed(answer).get("encryption_key")
        if not isinstance(found, dict):
            raise self._invalid("it holds no encryption key")
        return found

    def cancel(self, population: str, task_id: int) -> str:
        """Cancels a task and returns its status; a task that was over already keeps the status it had."""
        status = self._change(population, task_id, "cancel")
        if status in _ACTIVE:
            raise self._invalid("the task is still active")
        return task_pb2.TaskStatus.Enum.Name(status)

    def pause(self, population: str, task_id: int) -> None:
        """Pauses an open task; TASK_CONFLICT if it is not open."""
        if self._change(population, task_id, "pause") != task_pb2.TaskStatus.PAUSED:
            raise self._invalid("the task is not paused")

    def resume(self, population: str, task_id: int) -> None:
        """Resumes a paused task; TASK_CONFLICT if it is not paused."""
        if self._change(population, task_id, "resume") != task_pb2.TaskStatus.OPEN:
            raise self._invalid("the task is not open")

    def _change(self, population: str, task_id: int, verb: str) -> task_pb2.TaskStatus.Enum:
        from google.protobuf.message import DecodeError

        path = f"/taskmanagement/v1/population/{quote(population, safe='')}/tasks/{task_id}:{verb}"
        data, _ = self._ask("POST", path, {}, _DOCUMENT_LIMIT)
        try:
            return task_pb2.GetTaskByIdResponse.FromString(data).task.status
        except DecodeError:
            raise self._invalid("it is no task") from None

    def _document(self, path: str, query: dict[str, str]) -> dict[str, Any]:
        return self._parsed(self._ask("GET", path, query, _DOCUMENT_LIMIT)[0])

    def _pages(
        self, path: str, query: dict[str, str], name: str, limit: int, *, gaps: bool = False
    ) -> Iterator[dict[str, Any]]:
        query = {**query, "limit": str(limit)}
        for _ in range(_PAGES_LIMIT):
            document = self._document(path, query)
            found = self._listed(document, name)
            yield from found
            after = document.get("next")
            if after is None:
                return
            if (not found and not gaps) or after == query.get("after"):
                break
            query = {**query, "after": str(after)}
        raise self._invalid("its pages do not end")

    def _budget(self, document: dict[str, Any]) -> dict[str, Any] | None:
        found = document.get("budget")
        if not isinstance(found, (dict, type(None))):
            raise self._invalid("it holds no budget")
        return found

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            raise self._invalid("it is no JSON text") from None
        if not isinstance(document, dict):
            raise self._invalid("it is no JSON object")
        return document

    def _listed(self, document: dict[str, Any], name: str) -> list[dict[str, Any]]:
        found = document.get(name)
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._invalid(f"it holds no list of {name}")
        return found

    def _ask(
        self, method: str, path: str, query: dict[str, str], limit: int, document: dict[str, Any] | None = None
    ) -> tuple[bytes, Any]:
        import httpx

        body = bytearray()
        try:
            with (
                httpx.Client(timeout=_TIMEOUT, transport=httpx.HTTPTransport(retries=2)) as client,
                client.stream(method, self.url + path, params=query, json=document, headers=self._headers) as answer,
            ):
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > limit:
                        raise self._invalid(f"it is longer than {limit} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OperationFailed(
                Reason.SERVER_UNREACHABLE, f"no answer from {self.url}: {error or type(error).__name__}"
            ) from error
        if not answer.is_success:
            raise self._refusal(answer.status_code, bytes(body))
        return bytes(body), answer.headers

    def _refusal(self, status: int, body: bytes) -> OperationFailed:
        try:
            document = json.loads(body)
            reason, message = Reason(document["code"]), str(document["message"])
            remedy = str(document.get("remedy") or CATALOGUE[reason].remedy)
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._invalid(f"HTTP status {status} without a reason that this version knows")
        return OperationFailed(reason, message, remedy=remedy)

    def _invalid(self, what: str) -> OperationFailed:
        return OperationFailed(Reason.SERVER_ANSWER_INVALID, f"the answer of {self.url} cannot be used: {what}")


def _population_path(population: str) -> str:
    return f"/api/v1/populations/{quote(population, safe='')}"


def _task_path(population: str, task_id: int) -> str:
    return f"/api/v1/tasks/{quote(population, safe='')}/{task_id}"
