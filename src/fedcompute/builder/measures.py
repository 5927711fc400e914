"""What the task builder counts of itself, for Prometheus."""

from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

from fedcompute import __version__

_DURATIONS = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

# The time since which something is counted would be a series more for each; a process tells when it started.
disable_created_metrics()  # type: ignore[no-untyped-call]


class BuildMeasures:
    """The counters of one service, in a registry of its own; methods are safe from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._builds = Histogram(
            "fedcompute_build_seconds",
            "Builds by how they ended, the wait for their turn included.",
            ("outcome",),
            registry=self.registry,
            buckets=_DURATIONS,
        )
        info = Gauge(
            "fedcompute_build_info",
            "1; version and roles are its labels.",
            ("version", "roles"),
            registry=self.registry,
        )
        info.labels(__version__, "builder").set(1)
        ProcessCollector(registry=self.registry)

    def built(self, outcome: str, seconds: float) -> None:
        """Notes a build that ended: `built`, or the ErrorType of its refusal."""
        self._builds.labels(outcome).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
