"""What a Linux device says of itself, read from files as the kernel writes them."""

import pytest

from fedcompute.device.jobs.flags import Flags
from fedcompute.device.jobs.sensors import Places, read_conditions

ROUTES = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
AUTO = Flags()


@pytest.fixture
def kernel(tmp_path):
    """write(path, text) puts a file where the kernel would; `kernel.places` are its directories."""

    class Kernel:
        places = Places(
            **{name: tmp_path / name for name in ("power", "thermal", "hwmon", "net", "proc")}, temporary=tmp_path
        )

        def write(self, path, text):
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")

        def supply(self, name, **values):
            for key, value in values.items():
                self.write(f"power/{name}/{key}", value)

        def routes(self, *rows):
            lines = [
                f"{name}\t{target}\t010200C0\t{flags}\t0\t0\t{metric}\t{mask}\t0\t0\t0"
                for name, target, flags, metric, mask in rows
            ]
            self.write("proc/net/route", ROUTES + "\n".join(lines))

        def read(self, flags=AUTO):
            return read_conditions(flags, self.places, processors=4)

    return Kernel()


def default(name, metric=0, flags="0003"):
    return (name, "00000000", flags, metric, "00000000")


def test_what_cannot_be_read_counts_as_good_and_is_named(kernel):
    found = kernel.read()
    assert (found.idle, found.battery_percent, found.network, found.unmetered, found.thermal_status) == (
        True, 100, True, True, 0,
    )  # fmt: skip
    assert found.unknown == {"idle", "battery_percent", "network", "unmetered", "thermal_status"}
    assert found.free_bytes > 0


def test_this_very_machine_can_be_read():
    found = read_conditions(AUTO)
    assert found.load is not None
    assert 0 <= found.battery_percent <= 100
    assert found.free_bytes < 1 << 60


@pytest.mark.parametrize(("load", "idle"), [("1.99 0.1 0.1 1/2 3", True), ("2.00 0.1 0.1 1/2 3", False)])
def test_a_device_is_idle_below_half_a_processor_of_load_each(kernel, load, idle):
    kernel.write("proc/loadavg", load)
    found = kernel.read()
    assert (found.idle, found.load) == (idle, float(load[:4]) / 4)
    assert "idle" not in found.unknown


def test_a_machine_without_battery_is_full(kernel):
    kernel.supply("AC", type="Mains", online="1")
    kernel.supply("hidpp_battery_0", type="Battery", scope="Device", capacity="3", status="Discharging")
    found = kernel.read()
    assert (found.battery_percent, found.charging) == (100, True)
    assert "battery_percent" not in found.unknown


@pytest.mark.parametrize(
    ("status", "online", "charging"),
    [("Discharging", "0", False), ("Charging", "0", True), ("Full", "0", True), ("Not charging", "1", True)],
)
def test_a_battery_tells_its_level_and_whether_it_charges(kernel, status, online, charging):
    kernel.supply("BAT0", type="Battery", capacity="40", status=status)
    kernel.supply("BAT1", type="Battery", capacity="21", status="Unknown")
    kernel.supply("AC", type="Mains", online=online)
    found = kernel.read()
    assert (found.battery_percent, found.charging) == (30, charging)


def test_a_battery_that_does_not_tell_its_level_is_unknown(kernel):
    kernel.supply("BAT0", type="Battery", status="Discharging")
    found = kernel.read()
    assert (found.battery_percent, "battery_percent" in found.unknown) == (100, True)


@pytest.mark.parametrize(("temperature", "status"), [(69_999, 0), (70_000, 2), (84_999, 2), (85_000, 3), (95_000, 4)])
def test_trip_points_of_a_zone_give_the_thermal_status(kernel, temperature, status):
    zone = "thermal/thermal_zone0"
    kernel.write(f"{zone}/temp", temperature)
    for number, (kind, trip) in enumerate(
        [("active", 40_000), ("passive", 70_000), ("hot", 85_000), ("critical", 95_000), ("passive", 0), ("hot", "x")]
    ):
        kernel.write(f"{zone}/trip_point_{number}_type", kind)
        kernel.write(f"{zone}/trip_point_{number}_temp", trip)
    assert kernel.read().thermal_status == status


def test_the_hottest_sensor_decides(kernel):
    kernel.write("thermal/thermal_zone0/temp", 20_000)
    kernel.write("thermal/thermal_zone0/trip_point_0_type", "critical")
    kernel.write("thermal/thermal_zone0/trip_point_0_temp", 100_000)
    kernel.write("hwmon/hwmon3/temp1_input", 82_000)
    kernel.write("hwmon/hwmon3/temp1_max", 80_000)
    kernel.write("hwmon/hwmon3/temp1_crit", 100_000)
    found = kernel.read()
    assert (found.thermal_status, "thermal_status" in found.unknown) == (2, False)


@pytest.mark.parametrize(
    ("rows", "network", "unmetered"),
    [
        ([], False, True),
        ([("eth0", "000200C0", "0001", 0, "00FFFFFF")], False, True),
        ([default("eth0", flags="0002")], False, True),
        ([default("eth0")], True, True),
        ([default("wlan0")], True, True),
        ([default("wwan0")], True, False),
        ([default("ppp0")], True, False),
        ([default("usb0")], True, False),
        ([default("wwan0", 700), default("eth0", 100)], True, True),
        ([default("wwan0", 50), default("eth0", 100)], True, False),
    ],
)
def test_the_best_default_route_decides_whether_the_network_costs(kernel, rows, network, unmetered):
    kernel.routes(*rows)
    found = kernel.read()
    assert (found.network, found.unmetered) == (network, unmetered)
    assert not found.unknown & {"network", "unmetered"}


def test_an_interface_is_metered_by_its_type_or_driver_whatever_its_name(kernel, tmp_path):
    kernel.routes(default("modem"))
    assert kernel.read().unmetered
    kernel.write("net/modem/uevent", "DEVTYPE=wwan\nINTERFACE=modem")
    assert not kernel.read().unmetered
    kernel.write("net/modem/uevent", "INTERFACE=modem")
    driver = tmp_path / "drivers/rndis_host"
    driver.mkdir(parents=True)
    (tmp_path / "net/modem/device").mkdir()
    (tmp_path / "net/modem/device/driver").symlink_to(driver)
    assert not kernel.read().unmetered


def test_ipv6_alone_is_a_network_too(kernel):
    zero = "0" * 32
    kernel.routes()
    through_lo = f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo"
    kernel.write("proc/net/ipv6_route", through_lo)
    assert not kernel.read().network
    row = f"{zero} 00 {zero} 00 fe8{'0' * 28}1 00000400 00000001 00000000 00000003    wwan0"
    kernel.write("proc/net/ipv6_route", f"{through_lo}\n{row}")
    found = kernel.read()
    assert (found.network, found.unmetered) == (True, False)


def test_flags_say_what_the_kernel_does_not_know(kernel):
    kernel.write("proc/loadavg", "9.00")
    kernel.routes()
    configured = {"condition_idle": "true", "condition_unmetered": "true"}
    found = kernel.read(Flags(configured | {"condition_battery_percent": "12", "condition_thermal_status": "3"}))
    assert (found.idle, found.network, found.unmetered) == (True, True, True)
    assert (found.battery_percent, found.charging, found.thermal_status) == (12, False, 3)
    assert found.unknown == frozenset()
    costly = kernel.read(Flags({"condition_unmetered": "false", "condition_idle": "false"}))
    assert (costly.idle, costly.network, costly.unmetered) == (False, True, False)


def test_nonsense_of_a_driver_fails_nothing(kernel):
    kernel.supply("BAT0", type="Battery", capacity="-7", status="\xff")
    kernel.write("proc/loadavg", "")
    kernel.write("proc/net/route", f"{ROUTES}eth0\tx\ty\n\n")
    kernel.write("thermal/thermal_zone0/temp", "hot")
    found = kernel.read()
    assert (found.battery_percent, found.idle, found.network) == (0, True, False)
