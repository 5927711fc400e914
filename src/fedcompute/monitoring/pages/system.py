"""The system's page: what runs where, what waits, and what is stuck with what to do about it."""

import platform
import shutil
import time
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import Response

from fedcompute import __version__
from fedcompute.errors import FedComputeError
from fedcompute.monitoring.pages.actions import task_address
from fedcompute.monitoring.pages.attention import findings
from fedcompute.monitoring.pages.rendering import live_page
from fedcompute.monitoring.pages.table import page
from fedcompute.server.api.acts import caller_of
from fedcompute.server.configuration import masked, setting_fields
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.doctor.findings import Finding, Patient
from fedcompute.server.doctor.machine import folders
from fedcompute.server.setting import about
from fedcompute.server.state_gauges import waiting_batches
from fedcompute.storage import schema
from fedcompute.storage.api_keys import Role
from fedcompute.storage.iterations import list_iterations
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.migrations import HEAD
from fedcompute.storage.schema import ACTIVE_ITERATION

_STARTED = time.time()
_ROUNDS = 20
_LEASES = 50
_KEYS = 10
# What codes of findings begin with whose subject is a task, a round, or a batch of one.
_ABOUT_TASKS = ("task_", "round_", "uploads_", "batch_")


async def system_page(request: Request) -> Response:
    """How the server does. Hosts and paths are for operators; others see how many things need a look, and which."""
    context, told = context_of(request), caller_of(request).role.covers(Role.OPERATOR)
    return await live_page(request, "system.html", partial(_version, context), partial(_values, context, told))


def _version(context: Context) -> str:
    found, _ = findings(context)
    with context.database.read() as tx:
        rounds = list_iterations(tx, statuses=ACTIVE_ITERATION, limit=_ROUNDS)
        batches = waiting_batches(tx)[0]
    # Ages go on without anything happening.
    minute = int(time.time() // 5)
    return repr(([(one.code, one.subject) for one in found], len(rounds), batches, minute))


def _values(context: Context, told: bool) -> dict[str, Any]:
    moment = now()
    found, looked = findings(context)
    started = time.perf_counter()
    with context.database.read() as tx:
        rounds = list_iterations(tx, statuses=ACTIVE_ITERATION, limit=_ROUNDS)
        waiting, oldest = waiting_batches(tx)
        leases = tx.execute(select(schema.lease).order_by(schema.lease.c.name).limit(_LEASES)).all()
        keys = tx.execute(
            select(schema.encryption_key).order_by(schema.encryption_key.c.created.desc()).limit(_KEYS)
        ).all()
        dialect = tx.dialect.name
    latency = time.perf_counter() - started
    settings = context.settings
    return {
        "findings": found,
        "address": _address,
        "looked": looked,
        "told": told,
        "rounds": rounds,
        "age": lambda since: (moment - since).total_seconds(),
        "waiting": waiting,
        "oldest": _seconds(moment, oldest),
        "jobs": context.jobs.sizes(),
        "leases": leases,
        "keys": keys,
        "moment": moment,
        "engine": settings.runs_engine,
        "alive": context.is_alive(),
        "roles": " and ".join(settings.roles),
        "versions": {
            "fedcompute": __version__,
            "Python": platform.python_version(),
            "database": f"{dialect}, schema {HEAD}",
        },
        "uptime": time.time() - _STARTED,
        "latency": latency,
        "disks": _disks(context) if told else [],
        "settings": _settings(context) if told else [],
    }


def _address(finding: Finding) -> str | None:
    """The page of the task or round that a finding is about."""
    population, *numbers = finding.subject.split("/")
    if not finding.code.startswith(_ABOUT_TASKS) or not numbers or not all(one.isdecimal() for one in numbers[:2]):
        return None
    task = task_address(TaskKey(population, int(numbers[0])))
    return task if len(numbers) == 1 else f"{task}/rounds/{numbers[1]}"


def _seconds(moment: datetime, since: datetime | None) -> float | None:
    return None if since is None else (moment - since).total_seconds()


def _disks(context: Context) -> list[tuple[str, int, int]]:
    found, seen = [], set()
    for place in folders(Patient(context.settings, context.database, context.blobs, now())):
        try:
            device, usage = place.stat().st_dev, shutil.disk_usage(place)
        except (OSError, FedComputeError):
            continue
        # One line for a file system, however many folders lie on it.
        if device in seen:
            continue
        seen.add(device)
        found.append((str(place), usage.free, usage.total))
    return found


def _settings(context: Context) -> list[tuple[str, str, str]]:
    """Settings that are not their defaults, secrets masked."""
    found = []
    for one in setting_fields():
        value = getattr(context.settings, one.name)
        if value != one.default:
            found.append((one.name, str(masked(one.name, value)), about(one).help))
    return found


operations = (page("/system", system_page, "system"),)
