"""`fedcompute device`: one device of this machine, its apps, its tasks, and what they say."""

import typer

from fedcompute.cli import device_apps, device_jobs, device_rules

app = typer.Typer(no_args_is_help=True, help="Run this machine as a device: install apps, schedule and run training.")
app.add_typer(device_rules.config, name="config")
app.add_typer(device_rules.consent_app, name="consent")
for register in (device_apps.register, device_jobs.register, device_rules.register):
    register(app)
