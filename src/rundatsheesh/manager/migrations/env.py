"""Run by Alembic. The connection and its transaction belong to the caller: `store/database.py`."""

from alembic import context

from rundatsheesh.manager.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters tables by copying them
)
context.run_migrations()
