"""Identity tokens for requests to services that want to know who asks (spec/task-builder.md 8.3).

A token is fetched for each request and for one audience, so that none reaches a server it was not made for. No token
stands in a log or an error.
"""

import json
import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from fedcompute.errors import BuildFailed, Reason

logger = logging.getLogger(__name__)

_METADATA_HOST = "metadata.google.internal"
_IAM = "https://iamcredentials.googleapis.com"
_OAUTH = "https://oauth2.googleapis.com/token"
_ACCOUNT = "/computeMetadata/v1/instance/service-accounts/default"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LIMIT = 1 << 16
_TOKEN = re.compile(r"[\x21-\x7e]+")
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+")


def id_token_header(audience: str, impersonate: str = "") -> dict[str, str]:
    """The `authorization` header for a request to `audience`, a URL; nothing for this machine's own addresses.

    Without `impersonate` the token is the one of the machine's metadata server (GCE_METADATA_HOST), nothing where there
    is none. With it, a service account's e-mail, the token is that account's, made with the application default
    credentials; raises BuildFailed (SETTINGS_INVALID) where that fails.
    """
    if impersonate:
        logger.info("Retrieving id token from impersonated service account %s", impersonate)
        return _bearer(_impersonated(audience, impersonate))
    if urlsplit(audience).hostname in _LOCAL_HOSTS:
        return {}
    logger.info("Retrieving id token from metadata server.")
    token = _metadata("/identity", {"audience": audience})
    if token is None or not _TOKEN.fullmatch(token):
        logger.info("No metadata server gives a token; the request goes without one.")
        return {}
    return _bearer(token)


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def _impersonated(audience: str, account: str) -> str:
    if not _EMAIL.fullmatch(account):
        raise _failed(f"{account!r} is no service account's e-mail")
    base = os.environ.get("IAM_CREDENTIALS_URL", _IAM).removesuffix("/")
    answer = _request(
        "POST",
        f"{base}/v1/projects/-/serviceAccounts/{account}:generateIdToken",
        json={"audience": audience, "includeEmail": True},
        headers=_bearer(_access_token()),
    )
    token = _field(answer, "token")
    if token is None:
        raise _failed(
            f"no id token for {account}: "
            + ("its answer is unreadable" if answer is not None else "the request was refused or not answered")
        )
    return token


def _access_token() -> str:
    """An access token of the application default credentials: gcloud's file of a person, else the metadata server."""
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    path = Path(named) if named else Path.home() / ".config/gcloud/application_default_credentials.json"
    if path.is_file():
        token = _refreshed(path)
    elif named:
        raise _failed("GOOGLE_APPLICATION_CREDENTIALS names no file")
    else:
        token = _field(_metadata("/token", {}), "access_token")
    if token is None:
        raise _failed("no application default credentials give an access token")
    return token


def _refreshed(path: Path) -> str | None:
    with path.open("rb") as file:
        text = file.read(_LIMIT).decode(errors="replace")
    if _field(text, "type") != "authorized_user":
        raise _failed("the application default credentials are not those of a person")
    parts = {name: _field(text, name) or "" for name in ("client_id", "client_secret", "refresh_token")}
    address = os.environ.get("OAUTH_TOKEN_URL", _OAUTH)
    return _field(_request("POST", address, data={**parts, "grant_type": "refresh_token"}), "access_token")


def _metadata(path: str, parameters: dict[str, str]) -> str | None:
    host = os.environ.get("GCE_METADATA_HOST", _METADATA_HOST)
    url = f"http://{host}{_ACCOUNT}{path}"
    return _request("GET", url, params=parameters, headers={"Metadata-Flavor": "Google"}, trust_env=False, timeout=2.0)


def _request(method: str, url: str, *, trust_env: bool = True, timeout: float = 20.0, **parts: object) -> str | None:
    """The answer's text without white space around it; None without a success of at most 64 KiB."""
    body = b""
    try:
        with (
            httpx.Client(trust_env=trust_env and urlsplit(url).hostname not in _LOCAL_HOSTS, timeout=timeout) as client,
            client.stream(method, url, **parts) as answer,  # type: ignore[arg-type]
        ):
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > _LIMIT:
                    return None
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    return body.decode(errors="replace").strip() if answer.is_success else None


def _field(text: str | None, name: str) -> str | None:
    try:
        value = json.loads(text or "")[name]
    except (ValueError, TypeError, KeyError):
        return None
    return value if isinstance(value, str) and _TOKEN.fullmatch(value) else None


def _failed(detail: str) -> BuildFailed:
    return BuildFailed(
        Reason.SETTINGS_INVALID,
        f"--impersonate_service_account: {detail}",
        remedy="run `gcloud auth application-default login`, with the role Service Account Token Creator on it",
    )
