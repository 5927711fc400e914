"""The blob store: plans, checkpoints, updates and sums as objects in buckets (spec/server.md 2.5, 8).

Objects hold the bytes that were put, gzip included; their encoding is recognised by the first bytes, so a local
directory needs no metadata beside its files. An object becomes visible whole or not at all. A bucket is the first
segment of the path: `{root}/{bucket}/{path}`.
"""

import re
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from fedcompute.errors import OperationFailed, Reason, RequestRejected

PATH_LIMIT = 1024
CHUNK_BYTES = 1 << 20
_PART_BYTES = 5 << 20  # the smallest part that S3 takes
_SEGMENT = re.compile(r"[A-Za-z0-9._~:@!$&'()*+,;=-]{1,255}")


class BlobMissing(OperationFailed):
    """There is no such object."""


class BlobTooLarge(OperationFailed):
    """An object, or what a caller wants to make one, is larger than the caller's limit."""


@dataclass(frozen=True)
class BlobStream:
    """An object being read: its size in bytes, its content encoding ("gzip" or None), and its raw bytes."""

    size: int
    content_encoding: str | None
    chunks: AsyncIterator[bytes]


def open_blob_store(url: str) -> "BlobStore":
    """Opens a directory (a path or `file://`) or a bucket prefix (`s3://`, `gs://`, `az://`); makes the directory.

    Raises OperationFailed(SETTINGS_INVALID) if the URL names no supported store.
    """
    try:
        if "://" not in url:
            return BlobStore(LocalStore(prefix=Path(url).absolute(), mkdir=True))
        if url.startswith("file://"):
            return BlobStore(LocalStore.from_url(url, mkdir=True))
        return BlobStore(from_url(url))
    except (BaseError, ValueError, OSError) as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"the blob store cannot be opened: {type(error).__name__}"
        ) from None


class BlobStore:
    """Objects in buckets. Safe for threads; the synchronous methods block on I/O.

    Every method raises RequestRejected(MALFORMED_REQUEST) for a bucket or path that is not safe (absolute, with an
    empty segment, `.` or `..`, or characters that a URL path would encode) and OperationFailed(STORAGE_FAILED) if the
    store does not do its work.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._keeps_attributes = not isinstance(store, LocalStore)

    def put(self, bucket: str, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Writes an object whole. With `if_absent`, False and nothing written if it exists; of two racers one wins."""
        key = _key(bucket, path)
        try:
            obstore.put(
                self._store,
                key,
                data,
                mode="create" if if_absent else "overwrite",
                use_multipart=False,
                attributes=self._attributes(data[:3]),
            )
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise _failed("write", key, error) from error
        return True

    async def put_stream(self, bucket: str, path: str, chunks: AsyncIterable[bytes], limit: int) -> int:
        """Writes an object from chunks, at most `limit` bytes in all; returns its size.

        Nothing is visible until the last chunk is written; nothing is left if the chunks raise (their exception
        passes through), the caller is canceled, or the limit is passed: that raises BlobTooLarge(BLOB_TOO_LARGE).
        """
        key = _key(bucket, path)
        counted = _Counted(chunks, limit, key)
        first = await anext(counted, b"")
        try:
            await obstore.put_async(
                self._store,
                key,
                _chain(first, counted),
                attributes=self._attributes(first[:3]),
                chunk_size=_PART_BYTES,
                max_concurrency=2,
            )
        except (BaseError, OSError) as error:
            if counted.failure is error:
                raise
            raise _failed("write", key, error) from error
        return counted.size

    def get(self, bucket: str, path: str, limit: int) -> bytes:
        """Reads an object of at most `limit` bytes; raises BlobMissing(NOT_FOUND) or BlobTooLarge(BLOB_TOO_LARGE)."""
        key = _key(bucket, path)
        try:
            result = obstore.get(self._store, key)
            size = result.meta["size"]
            if size > limit:
                raise _too_large(key, limit)
            return bytes(result.bytes())
        except FileNotFoundError:
            raise _missing(key) from None
        except (BaseError, OSError) as error:
            raise _failed("read", key, error) from error

    async def open_stream(self, bucket: str, path: str, *, chunk_bytes: int = CHUNK_BYTES) -> BlobStream:
        """Opens an object for reading in chunks of about `chunk_bytes`; raises BlobMissing(NOT_FOUND)."""
        key = _key(bucket, path)
        try:
            result = await obstore.get_async(self._store, key)
            stream = result.stream(min_chunk_size=chunk_bytes)
            first = bytes(await anext(stream, b""))
        except FileNotFoundError:
            raise _missing(key) from None
        except (BaseError, OSError) as error:
            raise _failed("read", key, error) from error
        return BlobStream(result.meta["size"], content_encoding(first), _chain(first, stream))

    def size(self, bucket: str, path: str) -> int:
        """An object's size in bytes; raises BlobMissing(NOT_FOUND)."""
        key = _key(bucket, path)
        try:
            return int(obstore.head(self._store, key)["size"])
        except FileNotFoundError:
            raise _missing(key) from None
        except (BaseError, OSError) as error:
            raise _failed("read", key, error) from error

    def exists(self, bucket: str, path: str) -> bool:
        """Whether there is such an object, complete."""
        try:
            self.size(bucket, path)
        except BlobMissing:
            return False
        return True

    def list(self, bucket: str, prefix: str, *, limit: int = 100_000) -> list[str]:
        """The paths under the folder `prefix`, at any depth, sorted; `""` is the whole bucket.

        Raises BlobTooLarge(BLOB_TOO_LARGE) if there are more than `limit`.
        """
        key = _key(bucket, prefix) if prefix else _bucket(bucket)
        found: list[str] = []
        try:
            for page in obstore.list(self._store, key):
                found += [meta["path"][len(bucket) + 1 :] for meta in page]
                if len(found) > limit:
                    raise BlobTooLarge(Reason.BLOB_TOO_LARGE, f"folder {key} has more than {limit} objects")
        except FileNotFoundError:
            return []
        except (BaseError, OSError) as error:
            raise _failed("list", key, error) from error
        return sorted(found)

    def delete(self, bucket: str, path: str) -> bool:
        """Deletes an object; False if it did not exist (object stores that do not say so answer True)."""
        key = _key(bucket, path)
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise _failed("delete", key, error) from error
        return True

    def _attributes(self, first: bytes) -> dict[str, str] | None:
        encoding = content_encoding(first)
        return {"Content-Encoding": encoding} if self._keeps_attributes and encoding else None


def content_encoding(first: bytes) -> str | None:
    """What an object's first three bytes say about its encoding: "gzip" (RFC 1952, deflate) or None."""
    return "gzip" if first[:3] == b"\x1f\x8b\x08" else None


class _Counted:
    """Passes chunks on until their sum exceeds the limit, and remembers what ended them early."""

    def __init__(self, chunks: AsyncIterable[bytes], limit: int, key: str) -> None:
        self._chunks = aiter(chunks)
        self._limit = limit
        self._key = key
        self.size = 0
        self.failure: BaseException | None = None

    def __aiter__(self) -> "_Counted":
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await anext(self._chunks)
            self.size += len(chunk)
            if self.size > self._limit:
                raise _too_large(self._key, self._limit)
        except StopAsyncIteration:
            raise
        except BaseException as error:
            self.failure = error
            raise
        return chunk


async def _chain(first: bytes, rest: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for chunk in rest:
        if chunk:
            yield bytes(chunk)


def _bucket(bucket: str) -> str:
    if not _safe(bucket):
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the bucket's name is not safe")
    return bucket


def _key(bucket: str, path: str) -> str:
    _bucket(bucket)
    if len(path) > PATH_LIMIT or not all(_safe(segment) for segment in path.split("/")):
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the object's path is not safe")
    return f"{bucket}/{path}"


def _safe(segment: str) -> bool:
    return segment not in (".", "..") and _SEGMENT.fullmatch(segment) is not None


def _missing(key: str) -> BlobMissing:
    return BlobMissing(Reason.NOT_FOUND, f"there is no object {key}")


def _too_large(key: str, limit: int) -> BlobTooLarge:
    return BlobTooLarge(Reason.BLOB_TOO_LARGE, f"object {key} is larger than {limit} bytes")


def _failed(verb: str, key: str, error: Exception) -> OperationFailed:
    # The store's own words may hold a signed URL or an absolute path.
    return OperationFailed(Reason.STORAGE_FAILED, f"the store could not {verb} {key}: {type(error).__name__}")
