"""Keys, secrets, ledgers and budgets: what privacy rests on."""

import os
from collections.abc import Iterator, Mapping
from datetime import timedelta

from sqlalchemy import select

from fedcompute.errors import FedComputeError
from fedcompute.privacy.budget import spent_of
from fedcompute.privacy.chain import charge, rounds_of, verify_chain, verify_events
from fedcompute.privacy.charges import Spent, releases
from fedcompute.server.doctor.findings import Finding, Limits, Patient, spoken
from fedcompute.server.security.operator_secret import FILE_NAME, open_sealer
from fedcompute.storage import schema
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.releases import ledger_entries
from fedcompute.storage.schema import ACTIVE_TASK
from fedcompute.storage.secrets import check_sealed, sealed_with


def examine_secrets(patient: Patient, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Secrets stored in plain, and those that the operator secret at hand does not open."""
    with patient.database.read() as tx:
        used = sealed_with(tx)
    plain = None in used
    used.discard(None)
    if plain:
        yield Finding(
            "secrets_unsealed",
            "database",
            "keys or secrets are stored in plain: whoever copies the database has them",
            "start the server once with this release; it seals them",
        )
    given = environment.get("FEDCOMPUTE_SECRET") or patient.settings.secret_file
    if not given and not (patient.settings.data_dir / FILE_NAME).exists():
        if used:
            yield Finding(
                "secret_missing",
                FILE_NAME,
                f"keys and secrets are sealed with operator secret {', '.join(map(str, used))}, which is not here",
                "put it back into the data directory, or name it with --secret-file; without it no upload opens",
            )
        return
    if plain or not used:
        return
    try:
        sealer = open_sealer(patient.settings, patient.database, environment)
        with patient.database.read() as tx:
            check_sealed(tx, sealer)
    except FedComputeError as error:
        yield Finding("secret_unreadable", "operator secret", error.detail, error.remedy)


def examine_keys(patient: Patient, limits: Limits) -> Iterator[Finding]:
    """An embedded key service whose last published key runs out while tasks are active."""
    if patient.settings.key_service_public_url:
        return
    table, task = schema.encryption_key, schema.task
    with patient.database.read() as tx:
        active = tx.execute(
            select(task.c.task_id).where(task.c.status.in_([int(status) for status in ACTIVE_TASK])).limit(1)
        ).first()
        last = tx.execute(select(table.c.published_until).order_by(table.c.published_until.desc()).limit(1)).scalar()
    if active is None or last is None:
        return
    left = (last - patient.now) / timedelta(seconds=1)
    if left < limits.key_days * 86_400:
        state = "is no longer published" if left <= 0 else f"is published for {spoken(left)} more only"
        yield Finding(
            "keys_running_out",
            "encryption keys",
            f"the newest encryption key {state}; devices without a key upload nothing",
            "start a server, or: fedcompute keys rotate",
            {"seconds": left},
        )


def examine_ledgers(patient: Patient, limits: Limits) -> Iterator[Finding]:
    """Ledgers that are no chain or charge for too little, budgets that are spent or nearly so."""
    table, budgets = schema.privacy_ledger, schema.privacy_budget
    with patient.database.read() as tx:
        names = set(tx.execute(select(table.c.population_name).distinct()).scalars())
        names |= set(tx.execute(select(budgets.c.population_name)).scalars())
    for name in sorted(names):
        with patient.database.read() as tx:
            entries = ledger_entries(tx, name, limit=1 << 40)
            budget = budget_of(tx, name)
        problems = verify_chain(entries) + verify_events(entries)
        if problems:
            yield Finding(
                "ledger_broken",
                name,
                f"the privacy ledger has {len(problems)} problems: {problems[0]}",
                "trust no epsilon of this population; restore a backup whose ledger verifies",
                {"problems": len(problems)},
            )
            continue
        if budget is None:
            continue
        spent: Spent = {}
        for one_round in rounds_of([entry for entry in entries if entry.event is not None]):
            spent = charge(spent, one_round)
        epsilon = spent_of(budget, releases(spent))
        if epsilon >= limits.budget_share * budget.epsilon:
            yield Finding(
                "budget_nearly_spent",
                name,
                f"epsilon {epsilon:.4g} of {budget.epsilon:g} at delta {budget.delta:g} is spent",
                "let the tasks end, or decide about a larger budget: fedcompute privacy budget",
                {"epsilon": epsilon, "budget": budget.epsilon},
            )
