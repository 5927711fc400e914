"""Model directories as zip archives, packed by a client and unpacked by the service without trust."""

import io
import stat
import zipfile
from pathlib import Path, PurePosixPath

from fedcompute.errors import ArtifactInvalid, Reason

MAX_ARCHIVE_BYTES = 256 << 20
MAX_UNPACKED_BYTES = 1 << 30
MAX_ENTRIES = 1000
MAX_DEPTH = 16
_CHUNK = 1 << 20
_MARKER = "saved_model.pb"


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
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        # Damage, unknown compression, encryption, truncation, and names that the file system refuses.
        raise _invalid(f"the archive cannot be read: {type(error).__name__}") from error
    return _model_directory(target)


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
