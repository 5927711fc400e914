"""`fedcompute keys`: the encryption keys that a server publishes to devices."""

import json

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect

app = typer.Typer(no_args_is_help=True, help="List a server's encryption keys, and replace them ahead of time.")


@app.command("list", epilog="Example: fedcompute keys list")
def list_(
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List the server's encryption keys: which are published, and until when each opens uploads."""
    keys = connect(server, api_key_file).encryption_keys()
    if as_json:
        typer.echo(json.dumps(keys))
        return
    for key in keys:
        state = "published" if key["published"] else "withdrawn"
        typer.echo(f"{key['id']}  {state}  made {key['created'][:19]}Z  opens uploads until {key['expires'][:19]}Z")
    if not keys:
        typer.echo("no encryption keys; devices get those of an external key service")


@app.command(epilog="Example: fedcompute keys rotate")
def rotate(
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Publish a fresh key and withdraw all others now; what devices encrypted to those still opens."""
    key = connect(server, api_key_file).rotate_encryption_keys()
    if as_json:
        typer.echo(json.dumps(key))
        return
    typer.echo(
        f"encryption key {key['id']} is the only one published; devices that remember another "
        "go on using it until what they were told of its age has passed"
    )
