"""`fedcompute privacy`: what a task promises, what it spent, whether that is true, and what an attack finds."""

import typer

from fedcompute.cli import privacy_audit, privacy_epsilon, privacy_ledger, privacy_report

_ledger = typer.Typer()
_ledger.command("verify", epilog="Example: fedcompute privacy verify --population my_population")(privacy_ledger.verify)
_ledger.command("ledger", epilog="Example: fedcompute privacy ledger --population my_population > ledger.json")(
    privacy_ledger.ledger
)
_ledger.command(
    "budget", epilog="Example: fedcompute privacy budget --population my_population --epsilon 8 --delta 1e-6"
)(privacy_ledger.budget)

app = typer.Typer(no_args_is_help=True, help="Epsilon, noise, reports, ledgers, budgets and audits.")

for part in (privacy_epsilon.app, privacy_report.app, _ledger, privacy_audit.app):
    app.add_typer(part)
