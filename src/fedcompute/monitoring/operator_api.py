"""The server's operator API (`/api/v1`), asked from a prompt, a plot or a test."""

import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fedcompute.errors import OperationFailed, Reason

_DOCUMENT_LIMIT = 64 << 20
_ARTIFACT_LIMIT = 1 << 30
_TIMEOUT = 30.0


class OperatorApi:
    """One server by its URL. Methods block; every answer has a size limit.

    Methods raise OperationFailed: SERVER_UNREACHABLE, SERVER_ANSWER_INVALID for what no server of ours would say, and
    the server's own reason where it refuses.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise OperationFailed(
                Reason.URL_NOT_ALLOWED, f"{url!r} is no server URL", remedy="write it as http://host:port"
            )
        self.url = url.rstrip("/")

    def tasks(self, population: str | None = None) -> list[dict[str, Any]]:
        """Every task, or those of one population, each with its newest round."""
        query = "" if population is None else f"?population={quote(population, safe='')}"
        return list(self._json(f"/api/v1/tasks{query}")["tasks"])

    def task(self, population: str, task_id: int) -> dict[str, Any]:
        """One task: its rounds, metrics, rejections and ledger."""
        return self._json(_task_path(population, task_id))

    def metrics(self, population: str, task_id: int) -> dict[int, dict[str, float | None]]:
        """Released metrics by round and name; None where a value is not finite."""
        found: dict[int, dict[str, float | None]] = {}
        for metric in self.task(population, task_id)["metrics"]:
            value = metric["value"]
            finite = value is not None and math.isfinite(value)
            found.setdefault(int(metric["iteration_id"]), {})[str(metric["name"])] = float(value) if finite else None
        return found

    def checkpoint(self, population: str, task_id: int, iteration: int | None = None) -> tuple[bytes, int]:
        """A released server checkpoint and its round: the newest, or that of `iteration` (0: the initial one)."""
        query = "" if iteration is None else f"?iteration={iteration}"
        body, headers = self._request("GET", f"{_task_path(population, task_id)}/checkpoint{query}", _ARTIFACT_LIMIT)
        try:
            return body, int(headers["x-iteration"])
        except (KeyError, ValueError) as error:
            raise self._strange("the checkpoint does not say which round it is of") from error

    def plan(self, population: str, task_id: int) -> bytes:
        """The server plan."""
        return self._request("GET", f"{_task_path(population, task_id)}/plan", _ARTIFACT_LIMIT)[0]

    def cancel(self, population: str, task_id: int) -> None:
        """Cancels a task; nothing more of it is released."""
        path = f"/taskmanagement/v1/population/{quote(population, safe='')}/tasks/{task_id}:cancel"
        self._request("POST", path, _DOCUMENT_LIMIT)

    def _json(self, path: str) -> dict[str, Any]:
        body, _ = self._request("GET", path, _DOCUMENT_LIMIT)
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._strange("the answer is no JSON") from error
        if not isinstance(document, dict):
            raise self._strange("the answer is no JSON object")
        return document

    def _request(self, method: str, path: str, limit: int) -> tuple[bytes, Mapping[str, str]]:
        # Imported here: a command that only prints help needs no HTTP client.
        import httpx

        body = bytearray()
        try:
            with httpx.stream(method, self.url + path, timeout=_TIMEOUT) as answer:
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > limit:
                        raise self._strange(f"the answer has more than {limit} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OperationFailed(
                Reason.SERVER_UNREACHABLE, f"no answer from {self.url} ({type(error).__name__})"
            ) from error
        if not answer.is_success:
            raise self._refusal(answer.status_code, bytes(body))
        return bytes(body), answer.headers

    def _refusal(self, status: int, body: bytes) -> OperationFailed:
        try:
            document = json.loads(body)
            return OperationFailed(Reason(document["code"]), str(document["message"]), remedy=str(document["remedy"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._strange(f"the server answers {status}")

    def _strange(self, what: str) -> OperationFailed:
        return OperationFailed(Reason.SERVER_ANSWER_INVALID, f"{self.url}: {what}")


def _task_path(population: str, task_id: int) -> str:
    return f"/api/v1/tasks/{quote(population, safe='')}/{task_id}"
