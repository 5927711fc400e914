"""The state of tasks, rounds and batches as gauges: what alerts on stuck things look at (spec/lessons.md B, E4)."""

import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta

from cryptography.x509 import load_pem_x509_certificates
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import and_, func, select

from fedcompute.errors import FedComputeError
from fedcompute.server.context import Context, now
from fedcompute.server.doctor.findings import Patient
from fedcompute.server.doctor.machine import folders
from fedcompute.storage import schema
from fedcompute.storage.assignments import count_assignments
from fedcompute.storage.batches import sum_batches
from fedcompute.storage.charts import newest_entries
from fedcompute.storage.database import Transaction
from fedcompute.storage.iterations import list_iterations
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, AssignmentStatus, BatchStatus, TaskStatus
from fedcompute.storage.tasks import list_tasks

_KEPT = 5.0
_PATIENCE = 2.0
_MOST = 200
_LARGEST_CERTIFICATE = 1 << 20
_TASK_LABELS = ("population", "task")
# Every name that a scrape has from here, and that of the parts of /ready.
GAUGES = (
    "fedcompute_authentications_total",
    "fedcompute_batch_oldest_seconds",
    "fedcompute_batches_waiting",
    "fedcompute_disk_free_bytes",
    "fedcompute_encryption_key_expiry_timestamp_seconds",
    "fedcompute_engine_alive",
    "fedcompute_epsilon_budget",
    "fedcompute_epsilon_spent",
    "fedcompute_jobs_room",
    "fedcompute_jobs_running",
    "fedcompute_jobs_waiting",
    "fedcompute_leases_held",
    "fedcompute_part_ready",
    "fedcompute_round_assignments",
    "fedcompute_round_contributions",
    "fedcompute_round_excess",
    "fedcompute_round_report_goal",
    "fedcompute_round_status_seconds",
    "fedcompute_rounds_under_way",
    "fedcompute_scrape_complete",
    "fedcompute_task_created_seconds",
    "fedcompute_tasks",
    "fedcompute_tls_certificate_expiry_timestamp_seconds",
)


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
        yield from _rounds(context, tx, moment)
        yield from _batches(tx, moment)
        yield from _budgets(tx)
        yield from _keys(context, tx)
    about = "Decisions about devices by what was decided."
    decisions = CounterMetricFamily("fedcompute_authentications", about, labels=("decision",))
    counts = context.authentication.counts.all() if context.authentication is not None else {}
    for decision, count in counts.items():
        decisions.add_metric((decision,), count)
    yield decisions
    if context.settings.runs_engine:
        yield _gauge(
            "fedcompute_engine_alive",
            "1 if the round engine finished a pass within a minute.",
            float(context.is_alive()),
        )
        sizes = context.jobs.sizes()
        yield _gauge("fedcompute_jobs_running", "Jobs that have a worker or wait for one.", sizes.running)
        yield _gauge("fedcompute_jobs_waiting", "Jobs that wait to be tried again.", sizes.waiting)
        yield _gauge("fedcompute_jobs_room", "Jobs that are worth having at a time.", sizes.room)
        yield _gauge("fedcompute_leases_held", "Jobs that this engine keeps from others.", sizes.leases)
    places = folders(Patient(context.settings, context.database, context.blobs, moment))
    free = {place.name: shutil.disk_usage(place).free for place in places if place.exists()}
    disk = _family("fedcompute_disk_free_bytes", "Free bytes where data lie.", ("place",))
    for name, count in free.items():
        disk.add_metric((name,), count)
    yield disk


def _keys(context: Context, tx: Transaction) -> Iterable[Metric]:
    about = "When the newest encryption key is no longer published."
    family = _family("fedcompute_encryption_key_expiry_timestamp_seconds", about, ())
    until = schema.encryption_key.c.published_until
    last = tx.execute(select(until).order_by(until.desc()).limit(1)).scalar() if context.key_list is None else None
    if last is not None:
        family.add_metric((), last.timestamp())
    yield family
    family = _family("fedcompute_tls_certificate_expiry_timestamp_seconds", "When TLS's certificate expires.", ())
    if (file := context.settings.tls_certificate) is not None:
        # What is wrong with a file that the server could read when it started, the log tells.
        with suppress(OSError, ValueError), file.open("rb") as stream:
            leaf = load_pem_x509_certificates(stream.read(_LARGEST_CERTIFICATE))[0]
            family.add_metric((), leaf.not_valid_after_utc.timestamp())
    yield family


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


def _rounds(context: Context, tx: Transaction, moment: datetime) -> Iterable[Metric]:
    table = schema.iteration
    active = [int(status) for status in ACTIVE_ITERATION]
    query = select(table.c.status, func.count()).where(table.c.status.in_(active)).group_by(table.c.status)
    counted = {row[0]: row[1] for row in tx.execute(query)}
    family = _family("fedcompute_rounds_under_way", "Rounds under way by status.", ("status",))
    for status in sorted(ACTIVE_ITERATION):
        family.add_metric((status.name,), counted.get(int(status), 0))
    yield family
    # Rounds of one task that overlap share its labels.
    longest: dict[tuple[str, ...], float] = {}
    goals, arrived, devices = Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    excess: dict[tuple[str, ...], int] = {}
    for row in list_iterations(tx, statuses=ACTIVE_ITERATION, limit=_MOST):
        key = _labels(row.key.task)
        state = (*key, row.status.name)
        longest[state] = max(longest.get(state, 0.0), (moment - row.entered) / timedelta(seconds=1))
        goals[key] += row.report_goal
        counts = count_assignments(tx, row.key)
        arrived[key] += counts.get(AssignmentStatus.UPLOAD_COMPLETED, 0)
        for reached, count in counts.items():
            devices[(*key, reached.name)] += count
        if _fixed_denominator(context, row.key.task):
            excess[key] = max(excess.get(key, 0), sum_batches(tx, row.key).accepted - row.report_goal)
    state_labels = (*_TASK_LABELS, "status")
    for name, about, labels, values in (
        ("status_seconds", "How long rounds have had their status, the longest of a task.", state_labels, longest),
        ("report_goal", "Report goals of rounds under way.", _TASK_LABELS, goals),
        ("contributions", "Contributions that have arrived in rounds under way.", _TASK_LABELS, arrived),
        ("assignments", "Devices of rounds under way by status.", state_labels, devices),
        ("excess", "Contributions in a sum beyond what it is divided by, where that is fixed.", _TASK_LABELS, excess),
    ):
        family = _family(f"fedcompute_round_{name}", about, labels)
        for values_of_labels, value in values.items():
            family.add_metric(values_of_labels, max(0.0, value))
        yield family


def _fixed_denominator(context: Context, task: TaskKey) -> bool:
    try:
        return context.plans.server_plan(task).fixed_denominator
    except FedComputeError:
        # The engine reads the same plan, and tells.
        return False


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
