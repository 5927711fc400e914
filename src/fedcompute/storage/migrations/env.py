"""Alembic's entry; the connection is the transaction of `Database.open`."""

from alembic import context

from fedcompute.storage.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
