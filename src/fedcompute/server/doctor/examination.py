"""The examination of one server's stores, everything or nothing found; reads only."""

from collections.abc import Callable, Iterator
from functools import partial

from fedcompute.errors import FedComputeError
from fedcompute.server.doctor.findings import Finding, Limits, Patient
from fedcompute.server.doctor.machine import examine_database, examine_disk, examine_leases, examine_rights
from fedcompute.server.doctor.objects import examine_objects
from fedcompute.server.doctor.rounds import examine_rounds, examine_tasks
from fedcompute.server.doctor.trust import examine_keys, examine_ledgers, examine_secrets

Progress = Callable[[str], None]


def examine(patient: Patient, limits: Limits | None = None, progress: Progress = lambda _: None) -> list[Finding]:
    """Every finding, in the order of the examination. A part that cannot be examined is a finding itself.

    A server may run meanwhile; what it changes under the examination is asked again before it is told.
    """
    found: list[Finding] = []
    for name, part in _parts(patient, limits or Limits()).items():
        progress(name)
        try:
            found += part()
        except FedComputeError as error:
            found.append(Finding("not_examined", name, error.detail, error.remedy))
    return found


def _parts(patient: Patient, limits: Limits) -> dict[str, Callable[[], Iterator[Finding]]]:
    return {
        "database": partial(examine_database, patient, limits),
        "tasks": partial(examine_tasks, patient, limits),
        "rounds": partial(examine_rounds, patient, limits),
        "leases": partial(examine_leases, patient),
        "objects": partial(examine_objects, patient),
        "secrets": partial(examine_secrets, patient),
        "keys": partial(examine_keys, patient, limits),
        "ledgers": partial(examine_ledgers, patient, limits),
        "disk": partial(examine_disk, patient, limits),
        "rights": partial(examine_rights, patient),
    }
