"""Who may have tasks built: the builder keeps no keys; it asks the server for which it builds whether a key is good."""

import json
import re
from collections.abc import Mapping, Sequence

import httpx

from fedcompute.builder.identity import id_token_header
from fedcompute.errors import OperationFailed, Reason, RequestRejected

KEY_HEADER = "x-api-key"
_KEY = re.compile(r"fc_[\x21-\x7e]{1,200}")
_LIMIT = 1 << 16
_TIMEOUT = 30.0
BUILDERS = ("builder", "operator")
READERS = ("viewer", *BUILDERS)


def presented_key(headers: Mapping[str, str], query: Mapping[str, str]) -> str:
    """The API key that a request shows: `X-Api-Key`, `?key=`, `Authorization: Bearer`; "" for none.

    Keys of another form are those of gateways and identity services in front of the builder, and no concern of it.
    """
    bearer = headers.get("authorization", "").strip()
    scheme, _, token = bearer.partition(" ")
    shown = (headers.get(KEY_HEADER, ""), query.get("key", ""), token if scheme.lower() == "bearer" else "")
    return next((text.strip() for text in shown if _KEY.fullmatch(text.strip())), "")


def key_header(api_key: str) -> dict[str, str]:
    """The header that carries a key, beside whatever token a gateway in front of the server wants; {} for no key.

    Raises OperationFailed(SETTINGS_INVALID) for what no header may hold; the key is not repeated.
    """
    if not api_key:
        return {}
    if not _KEY.fullmatch(api_key):
        raise OperationFailed(Reason.SETTINGS_INVALID, "the API key is no key of a federated compute server")
    return {KEY_HEADER: api_key}


def check_caller(base_url: str, api_key: str, roles: Sequence[str] = BUILDERS) -> None:
    """Asks task management whether the key's holder has one of the roles, the least of them first; blocks.

    Raises RequestRejected: API_KEY_MISSING for no key or nobody to ask, API_KEY_INVALID, ROLE_INSUFFICIENT; and
    OperationFailed(SERVER_UNREACHABLE) if the server does not say.

    Formal guarantees: returns only if the server has answered, to this very key, that its role is one of `roles`.
    """
    if not api_key:
        raise RequestRejected(Reason.API_KEY_MISSING, "this task builder takes requests with an API key only")
    if not base_url:
        raise RequestRejected(Reason.API_KEY_MISSING, "this task builder has no server that could tell whose key it is")
    status, document = _asked(base_url.removesuffix("/"), api_key)
    if status in (401, 403):
        raise RequestRejected(Reason.API_KEY_INVALID, "the server does not take the API key")
    # A server that asks for no keys says `loopback`, whatever a proxy made of the key.
    if status != 200 or not str(document.get("actor", "")).startswith(api_key.split("_")[1] + " "):
        raise OperationFailed(Reason.SERVER_UNREACHABLE, f"the server does not say whose key it is (status {status})")
    if document.get("role") not in roles:
        raise RequestRejected(Reason.ROLE_INSUFFICIENT, f"this needs the role {roles[0]}")


def _asked(base: str, api_key: str) -> tuple[int, dict[str, object]]:
    body = b""
    headers = {**id_token_header(base), **key_header(api_key)}
    try:
        with (
            httpx.Client(timeout=_TIMEOUT) as client,
            client.stream("GET", f"{base}/api/v1/caller", headers=headers) as answer,
        ):
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > _LIMIT:
                    return 0, {}
        document = json.loads(body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OperationFailed(
            Reason.SERVER_UNREACHABLE, f"no answer from task management: {type(error).__name__}"
        ) from None
    except (ValueError, RecursionError):
        return answer.status_code, {}
    return answer.status_code, document if isinstance(document, dict) else {}
