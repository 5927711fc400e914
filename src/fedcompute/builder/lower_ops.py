"""The choice of when a device graph is lowered to operations that phones have."""

from enum import StrEnum


class LowerOps(StrEnum):
    """AUTO: when the operator check would fail otherwise. ALWAYS: also when it passes or is skipped."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"
