"""Reads a Linux device's conditions from /sys and /proc (spec/device.md 6.4).

What cannot be read counts as good: a board without a thermal sensor or a container without /sys still trains.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedcompute.device.jobs.conditions import Conditions
from fedcompute.device.jobs.flags import Flags

IDLE_LOAD = 0.5
"""Average load of a processor over the last minute below which the device is idle."""

_READ_LIMIT = 1 << 16
_ROUTE_UP, _ROUTE_REJECT = 0x1, 0x200
# Names that the kernel or systemd give to modems and tethered phones, drivers of the same, and their DEVTYPE.
_METERED_NAMES = ("wwan", "wwp", "ppp", "rndis", "usb", "rmnet")
_METERED_DRIVERS = ("rndis_host", "ipheth", "cdc_mbim", "qmi_wwan", "huawei_cdc_ncm")
# A passive trip slows processors down, a hot one warns, a critical one ends in a shutdown (Android's 2, 3 and 4).
_TRIPS = {"passive": 2, "hot": 3, "critical": 4}
_HWMON_TRIPS = {"max": 2, "crit": 4, "emergency": 5}


@dataclass(frozen=True)
class Places:
    """Where the kernel tells its state; `temporary`: where runs keep their files."""

    power: Path = Path("/sys/class/power_supply")
    thermal: Path = Path("/sys/class/thermal")
    hwmon: Path = Path("/sys/class/hwmon")
    net: Path = Path("/sys/class/net")
    proc: Path = Path("/proc")
    temporary: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))


def read_conditions(flags: Flags, places: Places | None = None, processors: int | None = None) -> Conditions:
    """The conditions now: what the flags `condition_...` say, else what the kernel says.

    `processors`: how many share the load, by default all of the machine. A flag for the battery also says that it does
    not charge; one for the network that there is one.
    """
    places = places if places is not None else Places()
    unknown: set[str] = set()
    idle, load = _idle(flags, places, processors or os.cpu_count() or 1, unknown)
    percent, charging = _battery(flags, places, unknown)
    network, unmetered = _network(flags, places, unknown)
    try:
        free = shutil.disk_usage(places.temporary).free
    except OSError:
        free = Conditions.free_bytes
        unknown.add("free_bytes")
    thermal_status = _thermal_status(flags, places, unknown)
    return Conditions(idle, load, percent, charging, network, unmetered, thermal_status, free, frozenset(unknown))


def _idle(flags: Flags, places: Places, processors: int, unknown: set[str]) -> tuple[bool, float | None]:
    configured = flags.text("condition_idle")
    if configured != "auto":
        return configured == "true", None
    first = _text(places.proc / "loadavg").partition(" ")[0]
    try:
        load = float(first) / processors
    except ValueError:
        unknown.add("idle")
        return True, None
    return load < IDLE_LOAD, load


def _battery(flags: Flags, places: Places, unknown: set[str]) -> tuple[int, bool]:
    configured = flags.text("condition_battery_percent")
    if configured != "auto":
        return int(configured), False
    levels, charging = [], False
    if not places.power.is_dir():
        unknown.add("battery_percent")
    for supply in _entries(places.power, "*"):
        if _text(supply / "scope") == "Device":
            continue  # of a mouse or a headset
        if _text(supply / "type") == "Battery":
            levels.append(_number(supply / "capacity"))
            charging |= _text(supply / "status") in ("Charging", "Full")
        else:
            charging |= (_number(supply / "online") or 0) > 0
    known = [level for level in levels if level is not None]
    if len(known) < len(levels):
        unknown.add("battery_percent")
    if not known:
        return 100, charging
    return max(0, min(100, sum(known) // len(known))), charging


def _thermal_status(flags: Flags, places: Places, unknown: set[str]) -> int:
    configured = flags.text("condition_thermal_status")
    if configured != "auto":
        return int(configured)
    found = [*_zones(places.thermal), *_sensors(places.hwmon)]
    if not found:
        unknown.add("thermal_status")
    return max((status for temperature, trip, status in found if temperature >= trip), default=0)


def _zones(thermal: Path) -> Iterator[tuple[int, int, int]]:
    """Temperature, trip point, and the status beyond it; of every trip point of every zone."""
    for zone in _entries(thermal, "thermal_zone*"):
        temperature = _number(zone / "temp")
        for kind in _entries(zone, "trip_point_*_type"):
            trip = _number(zone / kind.name.replace("_type", "_temp"))
            status = _TRIPS.get(_text(kind))
            # Trip points that are off read as 0 or below.
            if temperature is not None and trip is not None and trip > 0 and status is not None:
                yield temperature, trip, status


def _sensors(hwmon: Path) -> Iterator[tuple[int, int, int]]:
    for sensor in _entries(hwmon, "hwmon*/temp*_input"):
        temperature = _number(sensor)
        for limit, status in _HWMON_TRIPS.items():
            trip = _number(sensor.with_name(sensor.name.replace("_input", f"_{limit}")))
            if temperature is not None and trip is not None and trip > 0:
                yield temperature, trip, status


def _network(flags: Flags, places: Places, unknown: set[str]) -> tuple[bool, bool]:
    """Whether there is a network, and whether none of the ways to it costs."""
    configured = flags.text("condition_unmetered")
    if configured != "auto":
        return True, configured == "true"
    files = [places.proc / "net" / name for name in ("route", "ipv6_route")]
    if not any(file.is_file() for file in files):
        unknown.update({"network", "unmetered"})
        return True, True
    interfaces = {_best(_ipv4_defaults(files[0])), _best(_ipv6_defaults(files[1]))} - {None}
    return bool(interfaces), not any(_is_metered(places.net, name) for name in interfaces if name is not None)


def _ipv4_defaults(file: Path) -> Iterator[tuple[int, str]]:
    """Metric and interface of each default route."""
    for line in _text(file).splitlines()[1:]:
        fields = line.split()
        with suppress(ValueError, IndexError):
            flags = int(fields[3], 16)
            if int(fields[1], 16) == int(fields[7], 16) == 0 and flags & _ROUTE_UP and not flags & _ROUTE_REJECT:
                yield int(fields[6]), fields[0]


def _ipv6_defaults(file: Path) -> Iterator[tuple[int, str]]:
    for line in _text(file).splitlines():
        fields = line.split()
        with suppress(ValueError, IndexError):
            flags = int(fields[8], 16)
            # A host without IPv6 has one through lo that rejects.
            if int(fields[0], 16) == int(fields[1], 16) == 0 and flags & _ROUTE_UP and not flags & _ROUTE_REJECT:
                yield int(fields[5], 16), fields[9]


def _best(routes: Iterator[tuple[int, str]]) -> str | None:
    return min(routes, default=(0, None))[1]


def _is_metered(net: Path, interface: str) -> bool:
    if interface.startswith(_METERED_NAMES) or "DEVTYPE=wwan" in _text(net / interface / "uevent").splitlines():
        return True
    return (net / interface / "device/driver").resolve().name in _METERED_DRIVERS


def _entries(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _text(file: Path) -> str:
    """A small file's text without blanks at its ends; empty if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(_READ_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None
