"""The choice of when a device graph is lowered to operations that phones have."""

from enum import StrEnum

from fedcompute.errors import ConfigInvalid, Reason


class LowerOps(StrEnum):
    """AUTO: when the operator check would fail otherwise. ALWAYS: also when it passes or is skipped."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def read_lower_ops(text: str) -> LowerOps:
    """The choice of a request; raises ConfigInvalid (CONFIG_INVALID) for another word."""
    try:
        return LowerOps(text or LowerOps.AUTO)
    except ValueError as error:
        choices = ", ".join(LowerOps)
        detail = f"lower_ops is {text[:40]!r}; it is one of {choices}"
        raise ConfigInvalid(Reason.CONFIG_INVALID, detail) from error
