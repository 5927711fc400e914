"""Objects by URI: `gs://bucket/object`, `s3://bucket/object` (spec/task-builder.md 8.5).

Credentials and endpoints come from the environment, as the stores' own tools read them (AWS_*, GOOGLE_*).
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from fedcompute.errors import OperationFailed, Reason

SCHEMES = ("gs", "s3")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_MAX_KEY = 1024


@dataclass(frozen=True)
class ObjectUri:
    """An object or a folder in a bucket; `key` has no slash at either end and is "" for the bucket itself."""

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class Listed:
    """An object below a folder: its path there, its size in bytes, and a mark that changes with its content."""

    path: str
    size: int
    mark: str


def object_uri(uri: str) -> ObjectUri | None:
    """The parts of a URI with one of `SCHEMES`; None for anything else, a query or an unsafe path included."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    key = parts.path.strip("/")
    if parts.scheme not in SCHEMES or parts.query or parts.fragment or not _BUCKET.fullmatch(parts.netloc):
        return None
    if len(key) > _MAX_KEY or (key and not _safe_path(key)):
        return None
    return ObjectUri(parts.scheme, parts.netloc, key)


def list_folder(uri: ObjectUri, limit: int) -> list[Listed]:
    """The objects below `uri` followed by a slash, sorted; empty ones that only mark a folder are left out.

    Raises OperationFailed: STORAGE_FAILED, and BLOB_TOO_LARGE for more than `limit` objects.
    """
    folder = f"{uri.key}/" if uri.key else ""
    found: list[Listed] = []
    try:
        for page in obstore.list(_open(uri), uri.key or None):
            for meta in page:
                path = meta["path"]
                if path.startswith(folder):
                    mark = f"{meta['e_tag']} {meta['version']} {meta['last_modified']}"
                    found.append(Listed(path[len(folder) :], meta["size"], mark))
            if len(found) > limit:
                raise OperationFailed(Reason.BLOB_TOO_LARGE, f"{uri} holds more than {limit} objects")
    except FileNotFoundError:
        return []
    except (BaseError, OSError) as error:
        raise _failed("list", uri, error) from None
    folders = {part for item in found for part in _parents(item.path)}
    found = [item for item in found if item.size or item.path not in folders]
    return sorted(found, key=lambda listed: listed.path)


def read_object(uri: ObjectUri, limit: int) -> bytes | None:
    """An object's bytes, None if there is no such object.

    Raises OperationFailed: STORAGE_FAILED, and BLOB_TOO_LARGE for more than `limit` bytes, none of them kept.
    """
    data = bytearray()
    try:
        result = obstore.get(_open(uri), uri.key)
        for chunk in result:
            data += bytes(chunk)
            if len(data) > limit:
                raise OperationFailed(Reason.BLOB_TOO_LARGE, f"{uri} has more than {limit} bytes")
    except FileNotFoundError:
        return None
    except (BaseError, OSError) as error:
        raise _failed("read", uri, error) from None
    return bytes(data)


def write_object(uri: ObjectUri, data: bytes) -> None:
    """Writes an object whole; raises OperationFailed (STORAGE_FAILED)."""
    try:
        obstore.put(_open(uri), uri.key, data, use_multipart=False)
    except (BaseError, OSError) as error:
        raise _failed("write", uri, error) from None


def safe_relative(path: str) -> bool:
    """Whether a path below a folder can be written below a directory without leaving it."""
    return _safe_path(path) and len(path) <= _MAX_KEY


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _safe_path(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/")) and not any(c in path for c in "\\\0{}")


def _open(uri: ObjectUri) -> ObjectStore:
    try:
        # Client options given here would hide those of the environment.
        return from_url(f"{uri.scheme}://{uri.bucket}", retry_config={"max_retries": 2})
    except (BaseError, ValueError) as error:
        raise _failed("open", uri, error) from None


def _failed(verb: str, uri: ObjectUri, error: Exception) -> OperationFailed:
    # The store's own words may hold a signed URL.
    return OperationFailed(Reason.STORAGE_FAILED, f"the object store could not {verb} {uri}: {type(error).__name__}")
