"""Model directories as zip archives, packed by a client and unpacked by the service without trust.

An archive may hold the task configuration beside the model.
"""

import io
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fedcompute.errors import ArtifactInvalid, Reason

MAX_ARCHIVE_BYTES = 256 << 20
MAX_UNPACKED_BYTES = 1 << 30
MAX_ENTRIES = 1000
MAX_DEPTH = 16
_CHUNK = 1 << 20
MAX_CONFIG_BYTES = 1 << 20
_MARKER = "saved_model.pb"
_ZIP_START = b"PK\x03\x04"
_CONFIG_SUFFIXES = (".pbtxt", ".textproto", ".txtpb", ".prototxt", ".txt", ".json")
# What TensorFlow writes under such a name.
_MODEL_FILES = ("saved_model.pbtxt",)
_MODEL_DIRECTORIES = ("variables", "assets", "assets.extra", "__MACOSX")


def pack_directory(directory: Path) -> bytes:
    """A zip archive of a directory's regular files; equal content gives equal bytes.

    Raises ArtifactInvalid (SAVED_MODEL_INVALID) for a directory without a saved model or beyond the limits.
    """
    if not (directory / _MARKER).is_file():
        raise _invalid(f"{directory} is no saved model: it has no {_MARKER}")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if len(files) > MAX_ENTRIES or sum(path.stat().st_size for path in files) > MAX_UNPACKED_BYTES:
        raise _invalid(f"{directory} has over {MAX_ENTRIES} files or {MAX_UNPACKED_BYTES} bytes")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(directory).as_posix())
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    return buffer.getvalue()


def unpack(data: bytes, target: Path) -> Path:
    """Unpacks an archive below the existing, empty `target`; returns the directory that holds the saved model.

    The model may lie at the top or in the one directory at the top. Raises ArtifactInvalid (SAVED_MODEL_INVALID) for
    what is no zip archive, for entries that are absolute, climb out, are links or come twice, and beyond the limits;
    sizes are counted while unpacking, whatever the archive says of itself.
    """
    if len(data) > MAX_ARCHIVE_BYTES:
        raise _invalid(f"the archive has {len(data)} bytes; at most {MAX_ARCHIVE_BYTES} are accepted")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _extract(archive, target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        # Damage, unknown compression, encryption, truncation, and names that the file system refuses.
        raise _invalid(f"the archive cannot be read: {type(error).__name__}") from error
    return _model_directory(target)


def is_archive(file: BinaryIO) -> bool:
    """Whether a file at its start begins as a zip archive does; leaves it at its start."""
    start = file.read(len(_ZIP_START))
    file.seek(0)
    return start == _ZIP_START


def config_in_archive(file: BinaryIO) -> bytes:
    """The one task configuration in a zip archive, at most MAX_CONFIG_BYTES and one byte of it.

    It is the one file with a usual ending (.pbtxt, .textproto, .txt, .json ...) that is no part of the saved model.
    Raises ArtifactInvalid (SAVED_MODEL_INVALID) where there is none or more than one, or for a damaged archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise _invalid(f"the archive has {len(entries)} entries; at most {MAX_ENTRIES} are accepted")
            found = [entry for entry in entries if _may_be_config(entry)]
            if len(found) != 1:
                names = ", ".join(entry.filename[:100] for entry in found[:5]) or "none"
                raise ArtifactInvalid(
                    Reason.SAVED_MODEL_INVALID,
                    f"the archive must hold one task configuration; found: {names}",
                    remedy=f"put one file with an ending of {', '.join(_CONFIG_SUFFIXES)} beside the saved model",
                )
            with archive.open(found[0]) as source:
                return source.read(MAX_CONFIG_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise _invalid(f"the archive cannot be read: {type(error).__name__}") from error


def _may_be_config(entry: zipfile.ZipInfo) -> bool:
    *directories, name = PurePosixPath(entry.filename).parts or ("",)
    return (
        not entry.is_dir()
        and name.lower().endswith(_CONFIG_SUFFIXES)
        and name not in _MODEL_FILES
        and not name.startswith(".")
        and not any(part in _MODEL_DIRECTORIES for part in directories)
    )


def _extract(archive: zipfile.ZipFile, target: Path) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise _invalid(f"the archive has {len(entries)} entries; at most {MAX_ENTRIES} are accepted")
    budget = MAX_UNPACKED_BYTES
    for entry in entries:
        path = target.joinpath(*_safe_parts(entry))
        if entry.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, path.open("xb") as sink:
            while chunk := source.read(_CHUNK):
                budget -= len(chunk)
                if budget < 0:
                    raise _invalid(f"the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes")
                sink.write(chunk)


def _safe_parts(entry: zipfile.ZipInfo) -> tuple[str, ...]:
    name = entry.orig_filename
    parts = PurePosixPath(name).parts
    mode = stat.S_IFMT(entry.external_attr >> 16)
    unsafe = (
        not parts
        or len(parts) > MAX_DEPTH
        or name.startswith("/")
        or any(part == ".." or ":" in part for part in parts)
        or any(character in name for character in "\\\0")
        or mode not in (0, stat.S_IFREG, stat.S_IFDIR)
    )
    if unsafe:
        raise _invalid(f"the archive has the unsafe entry {name[:100]!r}")
    return parts


def _model_directory(target: Path) -> Path:
    if (target / _MARKER).is_file():
        return target
    # Archives made on a Mac carry a second directory of metadata.
    inner = [path for path in target.iterdir() if path.is_dir() and path.name != "__MACOSX"]
    if len(inner) == 1 and (inner[0] / _MARKER).is_file():
        return inner[0]
    raise _invalid(f"the archive holds no {_MARKER}, neither at its top nor in a single directory")


def _invalid(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.SAVED_MODEL_INVALID, detail)
