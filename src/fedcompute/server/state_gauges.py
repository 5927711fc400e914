"""The state of tasks, rounds and batches as gauges: what alerts on stuck things look at (spec/lessons.md B, E4)."""

import math
import shutil
import threading
import time
from collections.abc import Iterable
from datetime import datetime, timedelta

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import and_, func, select

from fedcompute.errors import FedComputeError
from fedcompute.server.context import Context, now
from fedcompute.server.doctor.findings import Patient
from fedcompute.server.doctor.machine import folders
from fedcompute.storage import schema
from fedcompute.storage.assignments import count_assignments
from fedcompute.storage.charts import newest_entries
from fedcompute.storage.database import Transaction
from fedcompute.storage.iterations import list_iterations
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, AssignmentStatus, BatchStatus, TaskStatus
from fedcompute.storage.tasks import list_tasks

_KEPT = 5.0
_PATIENCE = 2.0
_MOST = 200
_TASK_LABELS = ("population", "task")


class StateGauges:
    """The gauges of one server, looked for on a thread and at most every five seconds.

    A database that hangs costs a scrape two seconds; it gets what was known before, and `fedcompute_scrape_complete` 0.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._found: list[Metric] = []
        self._looked = float("-inf")
        self._thread: threading.Thread | None = None

    def __call__(self) -> Iterable[Metric]:
        with self._lock:
            if time.monotonic() - self._looked > _KEPT and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._look, name="state-gauges", daemon=True)
                self._thread.start()
            thread = self._thread
        if thread is not None:
            thread.join(_PATIENCE)
        complete = time.monotonic() - self._looked <= _KEPT + _PATIENCE
        yield from self._found
        yield _gauge("fedcompute_scrape_complete", "0 if the database did not answer in time.", float(complete))

    def _look(self) -> None:
        try:
            self._found = list(state(self._context))
            self._looked = time.monotonic()
        except FedComputeError:
            # `/ready` and the gauge of complete scrapes tell of it.
            return


def state(context: Context) -> Iterable[Metric]:
    """Every gauge of tasks, rounds, batches, budgets, disk and the engine, as the stores are now."""
    moment = now()
    with context.database.read() as tx:
        yield from _tasks(tx, moment)
        yield from _rounds(tx, moment)
        yield from _batches(tx, moment)
        yield from _budgets(tx)
    if context.authentication is not None:
        decisions = CounterMetricFamily(
            "fedcompute_authentications", "Decisions about devices by what was decided.", labels=("decision",)
        )
        for decision, count in context.authentication.counts.all().items():
            decisions.add_metric((decision,), count)
        yield decisions
    if context.settings.runs_engine:
        yield _gauge(
            "fedcompute_engine_alive",
            "1 if the round engine finished a pass within a minute.",
            float(context.is_alive()),
        )
        flying, waiting = context.jobs.sizes()
        yield _gauge("fedcompute_jobs_running", "Jobs that were given to a worker.", flying)
        yield _gauge("fedcompute_jobs_waiting", "Jobs that wait to be tried again.", waiting)
    disk = GaugeMetricFamily("fedcompute_disk_free_bytes", "Free bytes where data lie.", labels=("place",))
    for place in folders(Patient(context.settings, context.database, context.blobs, moment)):
        if place.exists():
            disk.add_metric((place.name,), shutil.disk_usage(place).free)
    yield disk


def _tasks(tx: Transaction, moment: datetime) -> Iterable[Metric]:
    table = schema.task
    family = GaugeMetricFamily("fedcompute_tasks", "Tasks by status.", labels=("status",))
    counted = {row[0]: row[1] for row in tx.execute(select(table.c.status, func.count()).group_by(table.c.status))}
    for status in TaskStatus:
        family.add_metric((status.name,), counted.get(int(status), 0))
    yield family
    created = _family("fedcompute_task_created_seconds", "How long tasks wait for their artifacts.", _TASK_LABELS)
    for row in list_tasks(tx, statuses=[TaskStatus.CREATED], limit=_MOST):
        created.add_metric(_labels(row.key), (moment - row.entered) / timedelta(seconds=1))
    yield created


def _rounds(tx: Transaction, moment: datetime) -> Iterable[Metric]:
    labels = (*_TASK_LABELS, "status")
    seconds = _family("fedcompute_round_status_seconds", "How long rounds have had their status.", labels)
    goals = _family("fedcompute_round_report_goal", "Report goals of rounds under way.", _TASK_LABELS)
    arrived = _family("fedcompute_round_contributions", "Contributions of rounds under way.", _TASK_LABELS)
    devices = _family("fedcompute_round_assignments", "Devices of rounds under way.", labels)
    for row in list_iterations(tx, statuses=ACTIVE_ITERATION, limit=_MOST):
        key = _labels(row.key.task)
        seconds.add_metric((*key, row.status.name), (moment - row.entered) / timedelta(seconds=1))
        goals.add_metric(key, row.report_goal)
        counts = count_assignments(tx, row.key)
        arrived.add_metric(key, counts.get(AssignmentStatus.UPLOAD_COMPLETED, 0))
        for status, count in counts.items():
            if count:
                devices.add_metric((*key, status.name), count)
    yield from (seconds, goals, arrived, devices)


def waiting_batches(tx: Transaction) -> tuple[int, datetime | None]:
    """How many batches of rounds under way are not added up yet, and since when the oldest waits."""
    table, rounds = schema.aggregation_batch, schema.iteration
    same = and_(*(table.c[name] == rounds.c[name] for name in schema.ITERATION_COLUMNS))
    waiting = [int(BatchStatus.FULL), int(BatchStatus.PUBLISH_COMPLETED)]
    active = [int(status) for status in ACTIVE_ITERATION]
    query = select(func.count(), func.min(table.c.status_time)).select_from(rounds).join(table, same)
    count, oldest = tx.execute(query.where(rounds.c.status.in_(active), table.c.status.in_(waiting))).one()
    return count, oldest


def _batches(tx: Transaction, moment: datetime) -> Iterable[Metric]:
    count, oldest = waiting_batches(tx)
    yield _gauge("fedcompute_batches_waiting", "Batches that are not added up yet.", count)
    age = (moment - oldest) / timedelta(seconds=1) if oldest else 0.0
    yield _gauge("fedcompute_batch_oldest_seconds", "How long the oldest of them has waited.", age)


def _budgets(tx: Transaction) -> Iterable[Metric]:
    spent = _family("fedcompute_epsilon_spent", "Epsilon of populations with a budget.", ("population",))
    budget = _family("fedcompute_epsilon_budget", "Budgets of populations.", ("population",))
    table = schema.privacy_budget
    for row in tx.execute(select(table.c.population_name, table.c.epsilon).limit(_MOST)):
        budget.add_metric((row.population_name,), row.epsilon)
        entries = newest_entries(tx, row.population_name, limit=1)
        epsilon = entries[0].cumulative_epsilon if entries else 0.0
        spent.add_metric((row.population_name,), math.inf if epsilon is None else epsilon)
    yield from (spent, budget)


def _labels(key: TaskKey) -> tuple[str, str]:
    return key.population, str(key.task_id)


def _family(name: str, about: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, labels=labels)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)
