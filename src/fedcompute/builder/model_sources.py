"""From a request's model, inline or by URI, to a directory; and a fingerprint of what lies there."""

import hashlib
from pathlib import Path

from fedcompute.builder.archive import MAX_ARCHIVE_BYTES, MAX_ENTRIES, MAX_UNPACKED_BYTES, unpack
from fedcompute.builder.local_files import local_path
from fedcompute.builder.object_stores import ObjectUri, list_folder, object_uri, read_object, safe_relative
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.protos import federatedcompute_pb2

_ZIP = ".zip"


def model_directory(
    source: federatedcompute_pb2.Resource, scratch: Path, *, local: bool = True, object_stores: bool = True
) -> Path:
    """The directory of a request's model: unpacked or downloaded below `scratch`, or a local one as it is.

    `local`, `object_stores`: whether URIs may name such a place. A URI that ends in .zip names an archive. Raises
    ArtifactInvalid (SAVED_MODEL_INVALID) for a place that is not allowed or empty, and beyond the archive's limits.
    """
    if source.WhichOneof("resource") == "inline_resource":
        return unpack(source.inline_resource.data, scratch)
    if object_stores and (uri := object_uri(source.uri)) is not None:
        try:
            return _downloaded(uri, scratch)
        except OperationFailed as error:
            raise _invalid(error.detail) from error
    path = local_path(source.uri) if local else None
    if path is None:
        raise ArtifactInvalid(
            Reason.SAVED_MODEL_INVALID,
            "the request names no saved model that this service reads" if source.uri else "saved_model is not set",
            remedy="send the model's directory inline, as task_builder_client does with a local path",
        )
    if path.suffix.lower() == _ZIP and path.is_file():
        with path.open("rb") as file:
            return unpack(file.read(MAX_ARCHIVE_BYTES + 1), scratch)
    return path


def fingerprint(
    source: federatedcompute_pb2.Resource, *, local: bool = True, object_stores: bool = True
) -> bytes | None:
    """SHA-256 that changes with the model's content; None where there is none to read, or too much of it.

    For object stores it covers names, sizes and the store's own content marks, not the bytes.
    """
    digest = hashlib.sha256()
    if source.WhichOneof("resource") == "inline_resource":
        digest.update(source.inline_resource.data)
        return digest.digest()
    try:
        if object_stores and (uri := object_uri(source.uri)) is not None:
            if uri.key.lower().endswith(_ZIP):
                return None
            listed = list_folder(uri, MAX_ENTRIES)
            if not listed or any(not item.mark for item in listed):
                return None
            digest.update(repr((str(uri), listed)).encode())
            return digest.digest()
        path = local_path(source.uri) if local else None
        return None if path is None else _directory_digest(path)
    except (OSError, OperationFailed):
        # The build says what is wrong with the place.
        return None


def _directory_digest(path: Path) -> bytes | None:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    if not 0 < len(files) <= MAX_ENTRIES or sum(file.stat().st_size for file in files) > MAX_UNPACKED_BYTES:
        return None
    digest = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(path)).encode(errors="surrogateescape")
        digest.update(b"%d %s" % (len(name), name))
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.digest()


def _downloaded(uri: ObjectUri, scratch: Path) -> Path:
    if uri.key.lower().endswith(_ZIP):
        data = read_object(uri, MAX_ARCHIVE_BYTES)
        if data is None:
            raise _invalid(f"there is no saved model at {uri}")
        return unpack(data, scratch)
    listed = list_folder(uri, MAX_ENTRIES)
    if not listed:
        raise _invalid(f"there is no saved model at {uri}")
    budget = MAX_UNPACKED_BYTES
    for item in listed:
        if not safe_relative(item.path):
            raise _invalid(f"{uri} holds an object with the unsafe name {item.path[:100]!r}")
        name = f"{uri.key}/{item.path}" if uri.key else item.path
        data = read_object(ObjectUri(uri.scheme, uri.bucket, name), budget)
        if data is None:
            raise _invalid(f"{uri} changed while it was read")
        budget -= len(data)
        target = scratch / item.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return scratch


def _invalid(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.SAVED_MODEL_INVALID, detail)
