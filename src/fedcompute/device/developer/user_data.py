"""What a device tells a service about its user's situation (spec/device.md 7.8)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

UNKNOWN_CARRIER = "UNKNOWN"


class Orientation(StrEnum):
    """How the screen is held; a device without one says undefined."""

    UNDEFINED = "undefined"
    PORTRAIT = "portrait"
    LANDSCAPE = "landscape"


@dataclass(frozen=True)
class AppInfo:
    """Of an app on this device."""

    is_installed: bool


@dataclass(frozen=True)
class UserData:
    """The situation as the device knows it now.

    `timezone_utc_offset`: whole minutes. `battery_percentage`: 0 to 100; a device on mains power says 100.
    `network_type`: "unmetered", "metered" or "none". `app_infos`: by package, empty unless the service is
    listed in `platform_data_for_execute_allowlist`.
    """

    timezone_utc_offset: timedelta = field(default_factory=timedelta)
    orientation: Orientation = Orientation.UNDEFINED
    available_storage_bytes: int = 0
    battery_percentage: int = 100
    carrier: str = UNKNOWN_CARRIER
    network_type: str = "none"
    app_infos: Mapping[str, AppInfo] = field(default_factory=dict)
