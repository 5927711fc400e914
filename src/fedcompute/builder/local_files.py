"""Paths and file URIs: reading a model from this machine and writing artifact-only builds to it."""

import os
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedcompute.errors import BuildFailed, ConfigInvalid, Reason


def local_path(uri: str) -> Path | None:
    """The path of `/a/b` or `file:///a/b`; None for a relative path, another scheme or another host."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        path = Path(unquote(parts.path))
    elif not parts.scheme:
        path = Path(uri)
    else:
        return None
    return path if path.is_absolute() and "\0" not in uri else None


def artifact_path(uri: str, storage_root: Path | None) -> Path:
    """Where an artifact of an artifact-only build goes: a path or file URI below `storage_root`.

    Raises ConfigInvalid for an empty URI, one with a placeholder left in it, and one that lies elsewhere.
    """
    wrong = "Cannot build artifacts because createTask returns invalid URLs: "
    if not uri:
        raise ConfigInvalid(Reason.CONFIG_INVALID, f"{wrong}empty URI.")
    if "{" in uri or "}" in uri:
        raise ConfigInvalid(
            Reason.CONFIG_INVALID, f"{wrong}{uri}. Replace the placeholder in braces by a real location."
        )
    path = local_path(uri)
    root = storage_root.resolve() if storage_root is not None else None
    if path is None or root is None or not path.resolve().is_relative_to(root):
        raise ConfigInvalid(Reason.CONFIG_INVALID, f"{wrong}{uri}. This service writes only below its storage root.")
    return path


def write_artifact(path: Path, data: bytes) -> None:
    """Writes a file in one step, replacing an older one; BuildFailed if the file system refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BuildFailed(Reason.ARTIFACT_UPLOAD_FAILED, f"Cannot upload artifact to: {path}") from error
