"""Versions of the schema, applied by `Database.open`."""

from pathlib import Path

from sqlalchemy import Connection

HEAD = "0004"
"""The newest version; a database that has it needs no migration, and Alembic is not imported."""


def upgrade(connection: Connection) -> None:
    """Brings the schema to `HEAD` inside the connection's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
