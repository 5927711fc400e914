"""What a setting of the server says about itself: its words, its panel, its bounds."""

from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

_ABOUT = "about"

T = TypeVar("T")

ADDRESS = "Address"
STORAGE = "Storage"
ROLES = "Work and workers"
WAITING = "When devices come back, and how long the server waits"
LIMITS = "Limits"
KEYS = "Encryption keys"
AUTHENTICATION = "Authentication of devices"
OPERATORS = "Operators"
RETENTION = "Retention"
LOGS = "Logs"


@dataclass(frozen=True)
class About:
    """What a field of `Settings` says about itself; the program, the file and the documentation are made from it."""

    help: str
    panel: str
    shown: str = ""  # what stands for a default that depends on other settings
    choices: tuple[str, ...] = ()
    secret: bool = False  # never shown; may hold a password
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def fault(self, value: Any) -> str | None:
        """Which rule of these a value breaks, None if it breaks none."""
        for one in value if isinstance(value, tuple) else (value,):
            if self.choices and one not in self.choices:
                return f"{one!r} is none of {', '.join(self.choices)}"
        if not isinstance(value, (int, float)):
            return None
        if self.above is not None and not value > self.above:
            return f"must be greater than {self.above:.10g}"
        if self.minimum is not None and not value >= self.minimum:
            return f"must be {self.minimum:.10g} or more"
        if self.maximum is not None and not value <= self.maximum:
            return f"must be {self.maximum:.10g} or less"
        return None


def setting(
    default: T,
    text: str,
    panel: str,
    *,
    shown: str = "",
    choices: tuple[str, ...] = (),
    secret: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> T:
    """A field of `Settings` with its default, one sentence of help and the panel that lists it.

    Flag, environment variable and key of the settings file follow from the field's name (`server.configuration`); the
    bounds, `above` without its own value, hold for every source.
    """
    told = About(text, panel, shown, choices, secret, minimum, maximum, above)
    return field(default=default, repr=not secret, metadata={_ABOUT: told})


def about(one: "Field[Any]") -> About:
    """What a field of `Settings` says about itself; a field without `setting` says nothing."""
    found = one.metadata.get(_ABOUT)
    return found if isinstance(found, About) else About("", "Other")
