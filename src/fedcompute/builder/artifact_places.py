"""Where artifact-only builds write: local files below one directory, and object stores (spec/task-builder.md 7.3)."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedcompute.builder.local_files import local_path
from fedcompute.builder.object_stores import ObjectUri, object_uri, write_object
from fedcompute.errors import BuildFailed, ConfigInvalid, OperationFailed, Reason

Place = Path | ObjectUri
_WRONG = "Cannot build artifacts because createTask returns invalid URLs: "


@dataclass(frozen=True)
class PlaceRules:
    """Where a service writes: below `storage_root` (nowhere local if None), and to object stores or not."""

    storage_root: Path | None = None
    object_stores: bool = True


def artifact_place(uri: str, rules: PlaceRules) -> Place:
    """Where an artifact goes: a path, file URI or object URI that the rules allow.

    Raises ConfigInvalid for an empty URI, one with a placeholder left in it, and one that lies elsewhere.
    """
    if not uri:
        raise _refused("empty URI.", "set plan_url, client_plan_url and checkpoint_url of artifact_building")
    if "{" in uri or "}" in uri:
        raise _refused(f"{uri}. Replace the placeholder in braces by a real location.")
    if (place := object_uri(uri)) is not None and place.key:
        if not rules.object_stores:
            raise _refused(f"{uri}. This service writes to no object store.")
        return place
    path = local_path(uri)
    root = rules.storage_root.resolve() if rules.storage_root is not None else None
    # An object store needs a bucket and a name in it.
    if path is None:
        raise _refused(f"{uri}. Write /path, file:///path, gs://bucket/name or s3://bucket/name.")
    if root is None:
        raise _refused(f"{uri}. This service writes no local file; start it with --storage_root.")
    if path.resolve() == root or not path.resolve().is_relative_to(root):
        raise _refused(f"{uri}. This service writes only below its storage root {root}; see --storage_root.")
    return path


def write_artifact(place: Place, data: bytes) -> None:
    """Writes an artifact in one step, replacing an older one; BuildFailed if the storage refuses."""
    try:
        if isinstance(place, ObjectUri):
            write_object(place, data)
        else:
            _write_file(place, data)
    except (OSError, OperationFailed) as error:
        raise BuildFailed(Reason.ARTIFACT_UPLOAD_FAILED, f"Cannot upload artifact to: {place}") from error


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _refused(detail: str, remedy: str | None = None) -> ConfigInvalid:
    return ConfigInvalid(Reason.CONFIG_INVALID, f"{_WRONG}{detail}", remedy=remedy)
