"""What a server counts of itself, for Prometheus and for the charts of the dashboard (spec/server.md 10.1, 10.2).

Label values are bounded: a population is named only if it has a task, a path by its template.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from fedcompute import __version__
from fedcompute.storage.request_minutes import BUCKETS, CHECK_IN, REPORT, RequestMinute, bucket_of

# Whatever name a check-in gives that no task has.
UNKNOWN = "unknown"
# Of a check-in that got an assignment.
CREATED = "CREATED"
TIMERS = {CHECK_IN: "create_task_assignment_seconds", REPORT: "report_result_seconds"}
_WINDOW = 60.0
_LATENCIES = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_DURATIONS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0)

# The time since which something is counted would be a series more for each; a process tells when it started.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass
class _Count:
    requests: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))


class Measures:
    """The counters of one application, in a registry of its own; methods are safe from any thread."""

    def __init__(self, roles: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._known: frozenset[str] = frozenset()
        self._minutes: dict[tuple[int, str, str, str], _Count] = {}
        self._requests = self._summary(TIMERS[CHECK_IN], "Check-ins of devices.", ("population", "result"))
        self._reports = self._summary(TIMERS[REPORT], "Reports of devices.", ("population", "result"))
        self._longest = _Longest()
        self.registry.register(self._longest)
        self._http = Histogram(
            "http_server_requests_seconds",
            "Requests by the template of their path.",
            ("method", "uri", "status"),
            registry=self.registry,
            buckets=_LATENCIES,
        )
        ends = ("population", "end", "reason")
        self._rounds = self._counter("fedcompute_rounds", "Attempts of rounds that ended.", ends)
        self._phases = Histogram(
            "fedcompute_round_phase_seconds",
            "How long released rounds collected, aggregated and applied.",
            ("phase",),
            registry=self.registry,
            buckets=_DURATIONS,
        )
        self._contributions = self._counter(
            "fedcompute_contributions", "Contributions that a batch counted or rejected.", ("population", "result")
        )
        self._jobs = self._counter("fedcompute_jobs", "Jobs of the round engine that ended.", ("kind", "outcome"))
        self._job_seconds = self._summary("fedcompute_job_seconds", "Time of jobs, queue included.", ("kind",))
        self._passes = self._summary("fedcompute_engine_pass_seconds", "Passes of the round engine.", ())
        self._leases_lost = self._counter("fedcompute_leases_lost", "Leases of jobs that another engine took.", ())
        self._uploads = self._counter("fedcompute_upload_bytes", "Bytes of uploads as they travelled.", ())
        self._database = Histogram(
            "fedcompute_database_seconds",
            "Transactions by whether they may write, the wait for a connection or a turn included.",
            ("kind",),
            registry=self.registry,
            buckets=_LATENCIES,
        )
        info = Gauge(
            "fedcompute_build_info",
            "1; version and roles are its labels.",
            ("version", "roles"),
            registry=self.registry,
        )
        info.labels(__version__, "+".join(roles)).set(1)
        ProcessCollector(registry=self.registry)

    def know(self, populations: Iterable[str]) -> None:
        """Says which populations have tasks; others share one label."""
        self._known = frozenset(populations)

    def know_one(self, population: str) -> None:
        """Says that a population has a task, sooner than the database is asked again."""
        self._known |= {population}

    def population(self, name: str) -> str:
        """The label value of a population."""
        return name if name in self._known else UNKNOWN

    def device_request(self, endpoint: str, population: str, result: str, seconds: float) -> None:
        """Counts a check-in or a report, by what it was answered or what it said."""
        if result == CREATED:
            self.know_one(population)
        label = self.population(population)
        timer = self._requests if endpoint == CHECK_IN else self._reports
        timer.labels(label, result).observe(seconds)
        key = (int(time.time() // 60), endpoint, label, result)
        self._longest.add(TIMERS[endpoint], label, result, seconds)
        with self._lock:
            count = self._minutes.setdefault(key, _Count())
            count.requests += 1
            count.seconds += seconds
            count.longest = max(count.longest, seconds)
            count.buckets[bucket_of(seconds)] += 1

    def request(self, method: str, template: str, status: int, seconds: float) -> None:
        """Counts an HTTP request."""
        self._http.labels(method, template, str(status)).observe(seconds)

    def round_ended(self, population: str, end: str, reason: str = "") -> None:
        """Counts an attempt of a round that ended: `completed`, or how it failed and why."""
        self._rounds.labels(self.population(population), end, reason).inc()

    def phases(self, seconds: Mapping[str, float]) -> None:
        """Notes how long a released round's phases took."""
        for phase, value in seconds.items():
            self._phases.labels(phase).observe(value)

    def contributions(self, population: str, result: str, count: int = 1) -> None:
        """Counts contributions: `accepted`, or the code of why they were rejected."""
        self._contributions.labels(self.population(population), result).inc(count)

    def job(self, kind: str, outcome: str, seconds: float) -> None:
        """Counts a job that ended: `done`, `retried`, `outage` or `failed`."""
        self._jobs.labels(kind, outcome).inc()
        self._job_seconds.labels(kind).observe(seconds)

    def engine_pass(self, seconds: float) -> None:
        """Notes a pass of the round engine."""
        self._passes.observe(seconds)

    def leases_lost(self, count: int) -> None:
        """Counts leases of jobs that this engine held and another one has now."""
        self._leases_lost.inc(count)

    def transaction(self, kind: str, seconds: float) -> None:
        """Notes a transaction of the database, `read` or `write`."""
        self._database.labels(kind).observe(seconds)

    def uploaded(self, size: int) -> None:
        """Counts the bytes of an upload."""
        self._uploads.inc(size)

    def watch(self, state: Callable[[], Iterable[Metric]]) -> None:
        """Adds gauges that are asked for at every scrape."""
        self.registry.register(_State(state))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def recent(self) -> list[RequestMinute]:
        """Requests of devices that `take` has not taken yet."""
        with self._lock:
            return [_minute(key, count) for key, count in self._minutes.items()]

    def take(self) -> list[RequestMinute]:
        """Requests of devices since the last call, for the database."""
        with self._lock:
            taken, self._minutes = self._minutes, {}
        return [_minute(key, count) for key, count in taken.items()]

    def give_back(self, minutes: Iterable[RequestMinute]) -> None:
        """Takes back what could not be stored."""
        with self._lock:
            for one in minutes:
                key = (int(one.minute.timestamp() // 60), one.endpoint, one.population, one.result)
                count = self._minutes.setdefault(key, _Count())
                count.requests += one.count
                count.seconds += one.seconds_sum
                count.longest = max(count.longest, one.seconds_max)
                count.buckets = [first + second for first, second in zip(count.buckets, one.buckets, strict=True)]

    def _summary(self, name: str, about: str, labels: tuple[str, ...]) -> Summary:
        return Summary(name, about, labels, registry=self.registry)

    def _counter(self, name: str, about: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, about, labels, registry=self.registry)


class _Longest:
    """The longest request of the last one to two minutes, as a timer's `_max`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._now: dict[tuple[str, str, str], float] = {}
        self._before: dict[tuple[str, str, str], float] = {}

    def add(self, name: str, population: str, result: str, seconds: float) -> None:
        key = (name, population, result)
        with self._lock:
            self._turn()
            self._now[key] = max(self._now.get(key, 0.0), seconds)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            self._turn()
            longest = dict(self._before)
            for key, seconds in self._now.items():
                longest[key] = max(longest.get(key, 0.0), seconds)
        for name in TIMERS.values():
            labels = ("population", "result")
            family = GaugeMetricFamily(f"{name}_max", "The longest of the last minutes.", labels=labels)
            for (timer, population, result), seconds in sorted(longest.items()):
                if timer == name:
                    family.add_metric((population, result), seconds)
            yield family

    def _turn(self) -> None:
        gone = time.monotonic() - self._began
        if gone >= _WINDOW:
            self._before = self._now if gone < 2 * _WINDOW else {}
            self._now, self._began = {}, time.monotonic()


@dataclass(frozen=True)
class _State:
    state: Callable[[], Iterable[Metric]]

    def collect(self) -> Iterable[Metric]:
        return self.state()

    def describe(self) -> Iterable[Metric]:
        # Asked at registration otherwise, when there is no state yet.
        return ()


def _minute(key: tuple[int, str, str, str], count: _Count) -> RequestMinute:
    minute, endpoint, population, result = key
    moment = datetime.fromtimestamp(60 * minute, UTC)
    return RequestMinute(
        moment, endpoint, population, result, count.requests, count.seconds, count.longest, tuple(count.buckets)
    )
