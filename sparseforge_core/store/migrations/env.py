"""Alembic environment: runs on the connection that `engine.upgrade` hands over; there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from sparseforge_core.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
