"""Where the settings of a server come from: flags, environment, a TOML file, defaults, in this order.

Everything here is made from the fields of `Settings`: a new field has its flag, its variable and its key at once.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.kinds import Kind, kind_of_type, toml_string
from fedcompute.server.setting import about
from fedcompute.server.settings import RetryWindow, Settings

PREFIX = "FEDCOMPUTE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
DEFAULT = "default"
_FILE_LIMIT = 1024 * 1024
# Variables of other parts; one that merely resembles a setting must not be taken for its misspelling.
_FOREIGN = ("CONFIG", "CACHE_DIR", "API_KEY", "SECRET", "SERVER")


@dataclass(frozen=True)
class Source:
    """One setting as the server uses it, and where it was set: a flag, a variable, a file, or `default`."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Configuration:
    """The settings of a server, each with its source, in the order of the fields."""

    settings: Settings
    sources: tuple[Source, ...]


def setting_fields() -> tuple["Field[Any]", ...]:
    """Every setting, in the order in which people read them."""
    return fields(Settings)


def flag_of(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def kind_of(name: str) -> Kind:
    """How the values of a setting are written; raises TypeError for a type that nothing here can read."""
    return kind_of_type(_TYPES[name])


def configure(
    flags: Mapping[str, str | bool | Sequence[str]], environment: Mapping[str, str], file: Path | None = None
) -> Configuration:
    """Returns the settings from flags (by field name), environment variables, and a TOML file, in this order.

    `file` falls back to the variable FEDCOMPUTE_CONFIG. Raises OperationFailed(SETTINGS_INVALID) for a value of the
    wrong type, an unknown key, a misspelt variable, an empty variable, a file that cannot be read, or a value that
    `Settings` refuses; the message names where the value came from.
    """
    if file is None and CONFIG_VARIABLE in environment:
        file = Path(_filled(CONFIG_VARIABLE, environment[CONFIG_VARIABLE]))
    values: dict[str, tuple[Any, str]] = _from_file(file) if file is not None else {}
    values |= _from_environment(environment)
    for name, given in flags.items():
        values[name] = (_from_flag(name, given), flag_of(name))
    try:
        settings = Settings(**{name: value for name, (value, _) in values.items()})
    except OperationFailed as error:
        raise _with_origin(error, {name: origin for name, (_, origin) in values.items()}) from None
    return Configuration(
        settings,
        tuple(
            Source(one.name, getattr(settings, one.name), values[one.name][1] if one.name in values else DEFAULT)
            for one in setting_fields()
        ),
    )


def render_toml(configuration: Configuration) -> str:
    """The settings as a TOML file that `configure` reads to the same settings.

    Secrets are masked and commented out, as are settings whose default depends on others.
    """
    lines = [f"# fedcompute server settings; use with --config FILE or {CONFIG_VARIABLE}=FILE"]
    panels = dict.fromkeys(about(one).panel for one in setting_fields())
    sources = {one.name: one for one in configuration.sources}
    for panel in panels:
        lines += ["", f"# {panel}"]
        for one in setting_fields():
            if about(one).panel == panel:
                lines.append(_toml_line(one, sources[one.name]))
    return "\n".join(lines) + "\n"


def render_json(configuration: Configuration) -> str:
    """The settings as a JSON list of {name, value, origin, flag, variable}; secrets are masked."""
    document = [
        {
            "name": one.name,
            "value": _jsonable(masked(one.name, one.value)),
            "origin": one.origin,
            "flag": flag_of(one.name),
            "variable": variable_of(one.name),
        }
        for one in configuration.sources
    ]
    return json.dumps(document, indent=2)


def masked(name: str, value: Any) -> Any:
    """The value, or what may be shown of it: neither passwords and query values of a URL nor arguments of a program."""
    if not about(_FIELDS[name]).secret or value is None or value == ():
        return value
    if isinstance(value, tuple):
        return tuple(masked(name, one) for one in value)
    text = str(value)
    if re.fullmatch(r"plain|(file|aes):(?!//).*", text):
        return text
    if text.startswith("command:"):
        program, *arguments = text.split(maxsplit=1)
        return f"{program} ***" if arguments else program
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return "***"
    scheme, _, rest = text.partition("://")
    if re.search(r"[/?#@]", rest.rpartition("@")[0]):
        # Where such a login ends, if it is one, depends on who reads it.
        return f"{scheme}://***"
    place, question, query = rest.partition("?")
    user, at, host = place.rpartition("@")
    if at:
        place = f"{user.partition(':')[0]}:***@{host}" if ":" in user else f"***@{host}"
    return f"{scheme}://{place}{question}" + re.sub(r"=[^&]*", "=***", query)


def _from_flag(name: str, given: str | bool | Sequence[str]) -> Any:
    kind = kind_of(name)
    if isinstance(given, bool):
        return given
    try:
        if isinstance(given, str):
            return kind.read_text(given)
        return tuple(value for one in given for value in kind.read_text(one))
    except ValueError as error:
        raise _invalid(flag_of(name), name, error) from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    values: dict[str, tuple[Any, str]] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in _FIELDS:
            _refuse_misspelt(variable)
            continue
        kind = kind_of(name)
        try:
            values[name] = (kind.read_text(text if kind.many else _filled(variable, text)), variable)
        except ValueError as error:
            raise _invalid(variable, name, error) from None
    return values


def _filled(variable: str, text: str) -> str:
    # What fills variables from elsewhere leaves them empty when it finds nothing; to go on with a default hides that.
    if not text.strip():
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"{variable} is set and empty", remedy="give it a value, or do not set it"
        )
    return text


def _refuse_misspelt(variable: str) -> None:
    name = variable.removeprefix(PREFIX)
    if name in _FOREIGN:
        return
    near = difflib.get_close_matches(name, [one.upper() for one in _FIELDS], 1, 0.75)
    if near:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"there is no setting {variable}",
            remedy=f"did you mean {PREFIX}{near[0]}? Otherwise do not set it",
        )


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    try:
        with path.open("rb") as opened:
            data = opened.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"the settings file {path} cannot be read: {error.strerror}",
            remedy="name it with --config or FEDCOMPUTE_CONFIG; neither is needed",
        ) from None  # fmt: skip
    if len(data) > _FILE_LIMIT:
        raise OperationFailed(Reason.SETTINGS_INVALID, f"the settings file {path} is larger than {_FILE_LIMIT} bytes")
    try:
        text = data.decode()
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"the settings file {path} is no TOML: {error}", remedy="correct that place"
        ) from None
    values = {}
    for key, value in document.items():
        where = f"{path}{_line_of(key, text)}"
        if key not in _FIELDS:
            near = difflib.get_close_matches(key.replace("-", "_").lower(), _FIELDS, 1, 0.6)
            raise OperationFailed(
                Reason.SETTINGS_INVALID,
                f"{where}: there is no setting {key!r}",
                remedy=f"did you mean {near[0]!r}?" if near else "fedcompute server --show-config lists every setting",
            )
        try:
            values[key] = (kind_of(key).read_toml(value), str(path))
        except ValueError as error:
            raise _invalid(f"{where}: {key}", key, error) from None
    return values


def _line_of(key: str, text: str) -> str:
    pattern = re.compile(rf"\s*\[*\s*[\"']?{re.escape(key)}[\"']?\s*[.=\]]")
    for number, line in enumerate(text.splitlines(), 1):
        if pattern.match(line):
            return f", line {number}"
    return ""


def _with_origin(error: OperationFailed, origins: Mapping[str, str]) -> OperationFailed:
    named = re.match(r"setting (\w+):", error.detail)
    origin = origins.get(named.group(1)) if named else None
    return OperationFailed(error.reason, f"{error.detail} (from {origin})", remedy=error.remedy) if origin else error


def _invalid(where: str, name: str, error: ValueError) -> OperationFailed:
    what = "its value cannot be read" if about(_FIELDS[name]).secret else str(error)
    return OperationFailed(
        Reason.SETTINGS_INVALID, f"{where}: {what}", remedy="fedcompute server --help shows how it is written"
    )


def _toml_line(one: "Field[Any]", source: Source) -> str:
    origin = "" if source.origin == DEFAULT else f"  # from {source.origin}"
    if source.value is None:
        shown = about(one).shown
        return f"# {one.name} =" + (f"  # default: {shown}" if shown else "")
    visible = masked(one.name, source.value)
    if visible != source.value:
        return f"# {one.name} = {toml_string(visible)}  # a secret, set by {source.origin}"
    return f"{one.name} = {kind_of(one.name).write_toml(source.value)}{origin}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, RetryWindow):
        return [value.minimum, value.maximum]
    if isinstance(value, tuple):
        return [_jsonable(one) for one in value]
    return str(value) if isinstance(value, Path) else value


_FIELDS: dict[str, "Field[Any]"] = {one.name: one for one in setting_fields()}
_TYPES = get_type_hints(Settings)
