"""Alembic's entry: the engine comes from ``Database.migrate``."""

from alembic import context
from sqlalchemy import Connection, text

from service.db import measured  # noqa: F401  - its tables belong to the metadata
from service.db.models import Base
from service.db.types import Json, LongText, ShortText, UtcDateTime

_LOCK = 0x4552504F  # "ERPO"; any number that nobody else takes.


def render_item(kind: str, item, autogen_context) -> str | bool:
    """Write our own column types by their names, and texts as what they are in the database."""
    if kind != "type":
        return False
    if isinstance(item, ShortText):
        return f"sa.String(length={item.impl.length})"
    if isinstance(item, LongText):
        return "sa.Text()"
    if isinstance(item, Json | UtcDateTime):
        name = type(item).__name__
        autogen_context.imports.add(f"from service.db.types import {name}")
        return f"{name}()"
    return False


def run() -> None:
    """Run the pending revisions in one transaction; a second process that migrates waits, then finds nothing to do."""
    engine = context.config.attributes["engine"].execution_options(erpo_write=True)
    with engine.connect() as connection, connection.begin():
        _lock(connection)
        context.configure(connection=connection, target_metadata=Base.metadata, render_item=render_item)
        context.run_migrations()


def _lock(connection: Connection) -> None:
    # On SQLite the transaction has begun with the write lock.
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


run()
