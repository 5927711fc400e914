"""What many devices need, from measured costs and stated assumptions: the tables of docs/scaling.md.

    python benchmarks/arithmetic.py [--devices 10000000] [--participations 1] [--parameters 1199882] ...

Measures nothing. Every number that goes in is a flag, so that a reader can put in another; `--update docs/scaling.md`
writes the tables there.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

DAY = 86_400
MONTH = 30
MARKS = "<!-- benchmarks/arithmetic.py writes this part -->", "<!-- end of benchmarks/arithmetic.py -->"


@dataclass(frozen=True)
class Inputs:
    """Assumptions first, then costs that the benchmarks measured on the machine of docs/scaling.md, then prices."""

    # What devices do. Phones compute only while idle and on an unmetered network, most of them at night.
    devices: float = 10e6
    participations: float = 1  # contributions of a device a day
    check_ins: float = 6  # times that a device asks a day
    key_fetches: float = 1  # a day
    peak: float = 3  # the busiest hour over the mean
    dropped: float = 0.2  # share of places that give no contribution
    populations: float = 10  # that the devices are divided among; each has its own rounds
    round_minutes: float = 30
    shortest_wait: float = 60  # seconds: the default of `retry_no_task`, if every device were refused
    longest_wait: float = 300
    # What is trained and kept.
    parameters: float = 1_199_882
    keep_updates_days: float = 1
    keep_assignments_days: float = 30
    # Measured: bytes.
    upload_bytes: float = 3.75  # for a parameter: gzip, encryption, base64, gzip
    download_bytes: float = 3.70  # for a parameter: gzip
    row_bytes: float = 2_400  # of a place in PostgreSQL: all its rows and indexes
    history_rows: float = 4  # of a contribution, beside its own
    # Measured: milliseconds of a core.
    aggregation_ms: float = 25  # an upload of 1.2 million parameters
    upload_ms: float = 8.4  # likewise, through the web server
    download_ms: float = 10.8  # likewise
    place_ms: float = 0.3  # a check-in that gets a place
    refusal_ms: float = 0.2  # one that does not
    report_ms: float = 2.1
    key_ms: float = 0.6
    # Measured: contributions a second whose rows a database writes from check-in to sum.
    sqlite_lives: float = 900
    postgresql_lives: float = 450
    # Assumed: what a database machine of 8 cores with fast disks writes over the two shared cores that were measured.
    postgresql_factor: float = 4
    utilisation: float = 0.6  # of any resource at the peak
    # Dollars.
    lists: float = 0.005  # a thousand, of 1,000 names each
    look_seconds: float = 5  # between two looks for uploads at the store
    core_hour: float = 0.04  # with 4 GiB of memory
    database_hour: float = 1.0  # 8 cores, 64 GiB; there are two, one stands by
    disk_month: float = 0.12  # a GB of the database's disk
    store_month: float = 0.023  # a GB of the object store
    puts: float = 0.005  # a thousand
    gets: float = 0.0004  # a thousand
    traffic: float = 0.05  # a GB that leaves for devices; what they upload costs nothing

    @property
    def rounds(self) -> float:
        """A day, of all populations."""
        return self.populations * DAY / 60 / self.round_minutes

    @property
    def listed(self) -> float:
        """LISTs a day: of each open round, half full on the average."""
        return self.populations * DAY / self.look_seconds * max(1, self.contributions / self.rounds / 2 / 1_000)

    @property
    def size(self) -> float:
        """The model over that of the measurements."""
        return self.parameters / 1_199_882

    @property
    def contributions(self) -> float:
        """A day."""
        return self.devices * self.participations

    @property
    def places(self) -> float:
        """A day."""
        return self.contributions / (1 - self.dropped)

    @property
    def asked(self) -> float:
        """Check-ins a day; each device asks at least as often as it gets a place."""
        return self.devices * max(self.check_ins, self.participations / (1 - self.dropped))

    @property
    def uploaded(self) -> float:
        """Bytes a day."""
        return self.contributions * self.parameters * self.upload_bytes

    @property
    def downloaded(self) -> float:
        """Bytes a day."""
        return self.places * self.parameters * self.download_bytes

    @property
    def message_seconds(self) -> float:
        """Seconds of web servers a day for messages: check-ins, reports, keys."""
        refused = self.asked - self.places
        milliseconds = self.places * (self.place_ms + self.report_ms) + refused * self.refusal_ms
        return (milliseconds + self.devices * self.key_fetches * self.key_ms) / 1e3

    @property
    def byte_seconds(self) -> float:
        """Seconds of web servers a day for uploads and downloads that pass them."""
        return self.size * (self.contributions * self.upload_ms + self.places * self.download_ms) / 1e3

    @property
    def aggregation_seconds(self) -> float:
        """Seconds of workers' cores a day."""
        return self.contributions * self.size * self.aggregation_ms / 1e3

    @property
    def stored_updates(self) -> float:
        """Bytes of updates that lie in the store: kept after their round, and half a day until they are looked for."""
        return self.uploaded * (self.keep_updates_days + 0.5)

    def at_peak(self, per_day: float) -> float:
        """A second in the busiest hour."""
        return per_day / DAY * self.peak

    def needed(self, seconds_per_day: float) -> int:
        """Cores that are busy for so long a day, at the peak and at the wanted utilisation; one at least."""
        return max(1, -int(-self.at_peak(seconds_per_day) / self.utilisation // 1))


@dataclass(frozen=True)
class Stage:
    """What stands there. `web`: API servers, each one process that uses one core; `workers`: cores."""

    name: str
    web: float
    workers: float
    lives: float  # contributions a second that the database writes
    disk: float = float("inf")  # bytes for updates
    network: float = float("inf")  # bits a second, each way
    through_servers: bool = True  # bytes of uploads and downloads
    lifted_by: str = ""


def stages(inputs: Inputs) -> list[Stage]:
    postgresql = inputs.postgresql_lives * inputs.postgresql_factor
    return [
        Stage(
            "a laptop: 2 cores, SQLite, 200 GB, 1 Gbit/s", 1, 1, inputs.sqlite_lives, 200e9, 1e9,
            lifted_by="`keep_updates_days = 0` (an hour or two instead of a day), then a larger disk",
        ),
        Stage(
            "one server: 16 cores, SQLite, 8 TB, 10 Gbit/s", 1, 15, inputs.sqlite_lives, 8e12, 10e9,
            lifted_by="more API servers, which need PostgreSQL",
        ),
        Stage(
            "the same server on PostgreSQL", 1, 15, postgresql, 8e12, 10e9,
            lifted_by="more API servers, and a store that all of them reach",
        ),
        Stage(
            "8 API servers and 32 worker cores on 2 such machines, which share 8 TB", 8, 32, postgresql, 8e12, 20e9,
            lifted_by="an object store instead of a disk",
        ),
        Stage(
            "the same with an object store behind the servers", 8, 32, postgresql, network=20e9,
            lifted_by="`blob_urls = \"store\"`: devices talk to the store, or more API servers",
        ),
        Stage(
            "the same, and devices talk to the store", 8, 32, postgresql, through_servers=False,
            lifted_by="populations on several deployments, each with a database of its own; or a larger database",
        ),
        Stage(
            "4 such deployments, populations sharded", 32, 128, 4 * postgresql, through_servers=False,
            lifted_by="more of the same",
        ),
    ]  # fmt: skip


def carried(inputs: Inputs, stage: Stage) -> dict[str, float]:
    """Devices that each resource of a stage carries."""
    web = inputs.message_seconds + (inputs.byte_seconds if stage.through_servers else 0)
    busiest = max(inputs.uploaded, inputs.downloaded) * 8
    found = {
        "web servers": stage.web * inputs.utilisation / inputs.at_peak(web),
        "workers": stage.workers * inputs.utilisation / inputs.at_peak(inputs.aggregation_seconds),
        "database writes": stage.lives * inputs.utilisation / inputs.at_peak(inputs.places),
        "disk for updates": stage.disk / inputs.stored_updates,
        "network": stage.network * inputs.utilisation / inputs.at_peak(busiest),
    }
    return {name: share * inputs.devices for name, share in found.items()}


def demand_rows(inputs: Inputs) -> list[tuple[str, str, str]]:
    one, waited = inputs, (inputs.shortest_wait + inputs.longest_wait) / 2
    rows_a_day = one.places * one.row_bytes
    return [
        ("check-ins", f"{number(one.devices)} devices x {number(one.check_ins)} a day", per_second(one, one.asked)),
        (
            "if all were refused and waited by default",
            f"{number(one.devices)} devices / {number(waited)} s (`retry_no_task`)",
            f"{number(one.devices / waited)} a second",
        ),
        (
            "assignments", f"{number(one.contributions)} contributions a day / {1 - one.dropped:g}",
            per_second(one, one.places),
        ),
        (
            "reports, and uploads", f"{number(one.contributions)} a day",
            per_second(one, one.contributions),
        ),
        (
            "key service calls", f"{number(one.devices)} devices x {number(one.key_fetches)} a day",
            per_second(one, one.devices * one.key_fetches),
        ),
        (
            "rounds", f"{number(one.populations)} populations x one in {number(one.round_minutes)} minutes",
            f"{number(one.rounds)} a day of {number(one.contributions / one.rounds)} contributions",
        ),
        (
            "upload bytes", f"{number(one.parameters)} parameters x {one.upload_bytes:g} bytes",
            f"{size(one.uploaded)} a day, {one.at_peak(one.uploaded) * 8 / 1e9:.1f} Gbit/s at the peak",
        ),
        (
            "download bytes", f"{number(one.parameters)} parameters x {one.download_bytes:g} bytes",
            f"{size(one.downloaded)} a day, {one.at_peak(one.downloaded) * 8 / 1e9:.1f} Gbit/s at the peak",
        ),
        (
            "updates in the store", f"{number(one.keep_updates_days)} day after the round, half a day before",
            size(one.stored_updates),
        ),
        (
            "database rows", f"{number(one.places)} assignments a day x (1 + {number(one.history_rows)} of history)",
            f"{number(one.places * (1 + one.history_rows))} a day",
        ),
        (
            "database bytes",
            f"{number(one.places)} x {number(one.row_bytes)} bytes, for {number(one.keep_assignments_days)} days",
            f"{size(rows_a_day)} a day, {size(rows_a_day * one.keep_assignments_days)} kept",
        ),
        (
            "aggregation", f"{number(one.contributions)} x {one.size * one.aggregation_ms:.3g} ms",
            f"{number(one.aggregation_seconds)} CPU-seconds a day: {cores(one, one.aggregation_seconds)}",
        ),
        (
            "web servers, messages", "check-ins, reports, keys",
            f"{number(one.message_seconds)} CPU-seconds a day: {cores(one, one.message_seconds)}",
        ),
        (
            "web servers, bytes", "uploads and downloads, unless devices talk to the store",
            f"{number(one.byte_seconds)} CPU-seconds a day: {cores(one, one.byte_seconds)}",
        ),
    ]  # fmt: skip


def cost_rows(inputs: Inputs) -> list[tuple[str, str, float]]:
    """Dollars a day with devices that talk to the store."""
    one = inputs
    kept = one.places * one.row_bytes * one.keep_assignments_days
    return [
        *(
            (
                what, f"{cores(one, seconds)} x 24 h x ${one.core_hour:g}", one.needed(seconds) * 24 * one.core_hour
            )
            for what, seconds in (("API servers", one.message_seconds), ("engine workers", one.aggregation_seconds))
        ),
        ("PostgreSQL", f"2 machines x 24 h x ${one.database_hour:g}", 48 * one.database_hour),
        ("its disk", f"2 x {size(kept)} x ${one.disk_month:g} / GB / {MONTH}", 2 * kept / 1e9 * one.disk_month / MONTH),
        (
            "object store", f"{size(one.stored_updates)} x ${one.store_month:g} / GB / {MONTH}",
            one.stored_updates / 1e9 * one.store_month / MONTH,
        ),
        ("PUTs", f"{number(one.contributions)} x ${one.puts:g} / 1,000", one.contributions / 1e3 * one.puts),
        (
            "LISTs", f"{number(one.populations)} rounds, looked at every {number(one.look_seconds)} s",
            one.listed / 1e3 * one.lists,
        ),
        (
            "GETs", f"(2 x {number(one.places)} + {number(one.contributions)}) x ${one.gets:g} / 1,000",
            (2 * one.places + one.contributions) / 1e3 * one.gets,
        ),
        ("traffic to devices", f"{size(one.downloaded)} x ${one.traffic:g} / GB", one.downloaded / 1e9 * one.traffic),
    ]  # fmt: skip


def document(inputs: Inputs) -> str:
    """The tables, in Markdown."""
    costs = cost_rows(inputs)
    ladder = []
    for stage in stages(inputs):
        found = carried(inputs, stage)
        first, second = sorted(found, key=found.__getitem__)[:2]
        then = f"{second} at {number(rounded(found[second]))}"
        ladder.append((stage.name, number(rounded(found[first])), f"**{first}**, then {then}", stage.lifted_by))
    busy = f"{inputs.utilisation:.0%} busy"
    return "\n".join(
        [
            f"### {number(inputs.devices)} devices, {number(inputs.parameters)} parameters",
            "",
            *table(("what", "from", "is"), demand_rows(inputs)),
            "",
            f"The busiest hour has {number(inputs.peak)} times the mean; cores are for that hour, {busy}.",
            "",
            "### What ends first",
            "",
            *table(("there are", "carries devices", "first bottleneck", "lifted by"), ladder),
            "",
            "### What it costs",
            "",
            *table(
                ("dollars a day", "from", "is"),
                [
                    *((name, how, f"{cost:,.0f}") for name, how, cost in costs),
                    ("**in all**", "", f"**{sum(cost for *_, cost in costs):,.0f}**"),
                ],
            ),
        ]
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def per_second(inputs: Inputs, per_day: float) -> str:
    return f"{number(per_day / DAY)} a second, {number(inputs.at_peak(per_day))} at the peak"


def cores(inputs: Inputs, seconds_per_day: float) -> str:
    needed = inputs.needed(seconds_per_day)
    return f"{needed} core{'s' * (needed > 1)}"


def rounded(value: float) -> float:
    """To two digits."""
    return float(f"{value:.2g}")


def number(value: float) -> str:
    if value >= 100e6:
        return f"{value / 1e6:,.0f} million"
    if value >= 1e6:
        return f"{value / 1e6:.3g} million"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def size(count: float) -> str:
    power = next((power for power in (12, 9, 6) if count >= 10**power), 3)
    return f"{count / 10**power:.3g} { {12: 'TB', 9: 'GB', 6: 'MB', 3: 'kB'}[power] }"


def updated(text: str, part: str) -> str:
    """A page with the tables between its marks; raises ValueError if it has none."""
    begin, end = MARKS
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError("the page has no place for the tables")
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Inputs):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default, metavar="N")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write the tables between the page's marks")
    arguments = vars(parser.parse_args())
    page: Path | None = arguments.pop("update")
    part = document(Inputs(**arguments))
    if page is None:
        sys.stdout.write(part + "\n")
    else:
        page.write_text(updated(page.read_text(), part))


if __name__ == "__main__":
    main()
