"""What an app declares: its service, and where that trains and downloads from (spec/device.md 8.1).

Besides Android's two XML files there is `odp.toml`, with the same content and no other keys:

    [service]
    name = "com.example.odpsample.SampleService"
    package = "com.example.odpsample"     # default: the name without its last part
    certificate-digest = "5F3A..."        # SHA-256 in hex, colons allowed; default: zeros

    [federated-compute-settings]
    url = "https://..."

    [download-settings]
    url = "https://..."
"""

import contextlib
import logging
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

from fedcompute.errors import ArtifactInvalid, Reason

MANIFEST_BYTES_LIMIT = 1 << 20
ELEMENTS_LIMIT = 20_000
NO_CERTIFICATE = "0" * 64

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9_$]+(\.[A-Za-z0-9_$]+)*")
_NAME_CHARACTERS = 255
_DIGEST = re.compile(r"[0-9A-F]{64}")
_RESOURCE = re.compile(r"@xml/([A-Za-z0-9_]+)")
_TOML_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)$")
_ANDROID = "http://schemas.android.com/apk/res/android "
_PROPERTY = "android.ondevicepersonalization.ON_DEVICE_PERSONALIZATION_CONFIG"
_TOML, _APP, _SETTINGS_ROOT = "odp.toml", "AndroidManifest.xml", "on-device-personalization"
_KEYS: Mapping[str, tuple[str, ...]] = {
    "service": ("name", "package", "certificate-digest"),
    "federated-compute-settings": ("url",),
    "download-settings": ("url",),
}


@dataclass(frozen=True)
class Manifest:
    """What an app declares. `package`: of the app; `service`: fully qualified class.

    `server`, `download`: URLs as declared, unchecked, None where there is none. `certificate_digest`: SHA-256 of the
    signing certificate, 64 hex digits in upper case; zeros unless an `odp.toml` names one.
    """

    package: str
    service: str
    server: str | None
    download: str | None
    certificate_digest: str = NO_CERTIFICATE


@dataclass(frozen=True)
class _Element:
    """A start tag. Attributes and names in a namespace begin with its URI and a blank; `depth` is 0 at the root."""

    name: str
    parent: str
    depth: int
    attributes: Mapping[str, str]
    place: tuple[int, int]  # line and column, from 1


@dataclass(frozen=True)
class _Settings:
    service: str
    server: str | None
    download: str | None


def read_manifest(path: Path) -> Manifest:
    """Reads an AndroidManifest.xml with the settings it points to, settings alone, an `odp.toml`, or finds the only
    one of them in a directory.

    Formal guarantees: package and service consist of letters, digits, `_`, `$` and single inner dots, so they stand in
    headers and paths as they are. No file outside `path`'s directory is read, links aside, and of each at most 1 MiB;
    no entity is expanded. Raises ArtifactInvalid (MANIFEST_INVALID) with file, line and, where known, column.
    """
    if path.is_dir():
        path = _only_manifest(path)
    if path.suffix == ".toml":
        return _from_toml(path)
    elements = _elements(path)
    if elements[0].name == _SETTINGS_ROOT:
        found = _settings(path, elements)
        if "." not in found.service:
            raise _invalid(path, f"service {found.service} has no package before its last part", elements[1].place)
        return Manifest(found.service.rpartition(".")[0], found.service, found.server, found.download)
    if elements[0].name == "manifest":
        return _from_app(path, elements)
    raise _invalid(path, f"the root is neither <manifest> nor <{_SETTINGS_ROOT}>", elements[0].place)


def _only_manifest(folder: Path) -> Path:
    found = [folder / name for name in (_TOML, _APP) if (folder / name).is_file()]
    if folder / _APP not in found:
        # An app's manifest names its settings itself.
        others = sorted([*folder.glob("res/xml/*.xml"), *folder.glob("*.xml")])
        found += [other for other in others if _root(other) == _SETTINGS_ROOT]
    if len(found) == 1:
        return found[0]
    if found:
        raise _invalid(folder, f"{len(found)} manifests: {', '.join(str(one.relative_to(folder)) for one in found)}")
    raise _invalid(folder, f"neither {_TOML} nor {_APP} nor XML with the root <{_SETTINGS_ROOT}>")


def _root(path: Path) -> str | None:
    seen: list[_Element] = []
    # A damaged file counts by its root; what is wrong with it is said when it is read.
    with contextlib.suppress(ArtifactInvalid):
        _parse(path, seen)
    return seen[0].name if seen else None


def _from_app(path: Path, elements: list[_Element]) -> Manifest:
    root = elements[0]
    package = root.attributes.get("package")
    if package is None:
        detail = "<manifest> has no package attribute; name it there, or read the settings XML itself"
        raise _invalid(path, detail, root.place)
    _check_name(path, "package", package, root.place)
    inside = [one for one in elements if one.depth == 2 and one.parent == "application"]
    properties = [one for one in inside if one.name == "property" and _android(one, "name") == _PROPERTY]
    if not properties:
        raise _invalid(path, f"no <property> {_PROPERTY} in <application>", root.place)
    pointer = properties[-1]
    resource = _RESOURCE.fullmatch(_android(pointer, "resource") or "")
    if resource is None:
        raise _invalid(path, f"{_PROPERTY}: android:resource is not @xml/NAME", pointer.place)
    file = path.parent / "res" / "xml" / f"{resource[1]}.xml"
    if not file.is_file():
        raise _invalid(path, f"{resource[0]}: there is no res/xml/{file.name}", pointer.place)
    found = _settings(file, _elements(file))
    services = [one for one in inside if one.name == "service" and _class(package, one) == found.service]
    if not services:
        raise _invalid(path, f"declares no <service> {found.service}, which {file.name} names", pointer.place)
    for attribute in ("isolatedProcess", "exported"):
        if _android(services[0], attribute) != "true":
            detail = f'service {found.service} needs android:{attribute}="true"'
            raise _invalid(path, detail, services[0].place)
    return Manifest(package, found.service, found.server, found.download)


def _android(element: _Element, attribute: str) -> str | None:
    return element.attributes.get(_ANDROID + attribute)


def _class(package: str, service: _Element) -> str:
    name = _android(service, "name") or ""
    if name.startswith("."):
        return package + name
    return name if "." in name else f"{package}.{name}"


def _settings(path: Path, elements: list[_Element]) -> _Settings:
    root, first = elements[0], elements[1] if len(elements) > 1 else None
    if root.name != _SETTINGS_ROOT:
        raise _invalid(path, f"the root is not <{_SETTINGS_ROOT}>", root.place)
    if first is None or first.name != "service":
        raise _invalid(path, f"the first element in <{_SETTINGS_ROOT}> is not <service>", (first or root).place)
    service = first.attributes.get("name")
    if service is None:
        raise _invalid(path, "<service> has no name", first.place)
    _check_name(path, "service", service, first.place)
    urls: dict[str, str | None] = {}
    for one in elements[2:]:
        if one.name in ("federated-compute-settings", "download-settings"):
            urls[one.name] = one.attributes.get("url")
        else:
            _LOG.warning("%s:%d: element <%s> is unknown and ignored", path, one.place[0], one.name)
    return _Settings(service, urls.get("federated-compute-settings"), urls.get("download-settings"))


def _elements(path: Path) -> list[_Element]:
    found: list[_Element] = []
    _parse(path, found)
    return found


def _parse(path: Path, found: list[_Element]) -> None:
    """Adds each start tag of an XML file, which is UTF-8 whatever it declares, or UTF-16 with a byte order mark.

    By expat itself, since ElementTree keeps no line numbers and expands the entities of a DOCTYPE.
    """
    data = _read(path)
    # Names the encoding, so that no declaration chooses among Python's codecs.
    parser = expat.ParserCreate("utf-8", " ")
    above: list[str] = [""]

    def place() -> tuple[int, int]:
        return parser.CurrentLineNumber, parser.CurrentColumnNumber + 1

    def refuse(*_: Any) -> None:
        raise _invalid(path, "a DOCTYPE is not taken", (parser.CurrentLineNumber,))

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(found) == ELEMENTS_LIMIT:
            raise _invalid(path, f"more than {ELEMENTS_LIMIT} elements", place())
        found.append(_Element(name, above[-1], len(above) - 1, attributes, place()))
        above.append(name)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: above.pop()
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise _invalid(path, expat.ErrorString(error.code), (error.lineno, error.offset + 1)) from None


def _from_toml(path: Path) -> Manifest:
    try:
        text = _read(path).decode()
        document = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise _invalid(path, f"byte {error.start} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        what, *place = _TOML_PLACE.split(str(error))[:3]
        raise _invalid(path, what, tuple(map(int, place))) from None
    except RecursionError:
        raise _invalid(path, "nested too deeply") from None
    for table, keys in document.items():
        if table not in _KEYS:
            raise _invalid(path, f"unknown table or key {table!r}", _line(text, table))
        if not isinstance(keys, dict):
            raise _invalid(path, f"{table} is not a table", _line(text, table))
        for key, value in keys.items():
            if key not in _KEYS[table]:
                raise _invalid(path, f"unknown key {key!r} in [{table}]", _line(text, table, key))
            if not isinstance(value, str):
                raise _invalid(path, f"{key} in [{table}] is not text", _line(text, table, key))
    values = document.get("service", {})
    service: str | None = values.get("name")
    if service is None:
        raise _invalid(path, "no name in [service]", _line(text, "service"))
    _check_name(path, "service", service, _line(text, "service", "name"))
    package: str = values.get("package", service.rpartition(".")[0])
    _check_name(path, "package", package, _line(text, "service", "package"))
    digest = values.get("certificate-digest", NO_CERTIFICATE).replace(":", "").upper()
    if not _DIGEST.fullmatch(digest):
        line = _line(text, "service", "certificate-digest")
        raise _invalid(path, f"certificate-digest has {len(digest)} characters that are not 64 hex digits", line)
    server, download = (document.get(table, {}).get("url") for table in list(_KEYS)[1:])
    return Manifest(package, service, server, download, digest)


def _line(text: str, table: str, key: str | None = None) -> tuple[int, ...]:
    """The line of a table or its key, as TOML is usually written; empty for other notations."""
    inside = ""
    for number, line in enumerate(text.split("\n"), 1):
        header = re.match(r"\s*\[+\s*[\"']?([^\"'\]]+?)[\"']?\s*\]", line)
        name = re.match(r"\s*[\"']?([^\"'=\s]+)[\"']?\s*=", line)
        if header:
            inside = header[1]
            if key is None and inside == table:
                return (number,)
        elif name and ((key is None and not inside and name[1] == table) or (inside == table and name[1] == key)):
            return (number,)
    return ()


def _check_name(path: Path, what: str, name: str, place: tuple[int, ...]) -> None:
    if not _NAME.fullmatch(name) or len(name) > _NAME_CHARACTERS:
        detail = f"{what} {name[:80]!r} is not a name of letters, digits, _ and $ with single dots between"
        raise _invalid(path, detail, place)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES_LIMIT + 1)
    except OSError as error:
        raise _invalid(path, error.strerror or type(error).__name__) from error
    if len(data) > MANIFEST_BYTES_LIMIT:
        raise _invalid(path, f"more than {MANIFEST_BYTES_LIMIT} bytes")
    return data


def _invalid(path: Path, what: str, place: tuple[int, ...] = ()) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.MANIFEST_INVALID, f"{':'.join(map(str, (path, *place)))}: {what}")
