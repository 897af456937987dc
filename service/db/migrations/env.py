"""Alembic's entry: the engine comes from ``Database.migrate``."""

from alembic import context

from service.db import measured  # noqa: F401  - its tables belong to the metadata
from service.db.models import Base
from service.db.types import UtcDateTime


def render_item(kind: str, item, autogen_context) -> str | bool:
    """Write our own column types by their names."""
    if kind == "type" and type(item).__name__ in ("UtcDateTime", "JSON"):
        name = "UtcDateTime()" if isinstance(item, UtcDateTime) else "Json"
        autogen_context.imports.add(f"from service.db.types import {name.removesuffix('()')}")
        return name
    return False


def run() -> None:
    """Run the pending revisions in one transaction."""
    engine = context.config.attributes["engine"].execution_options(erpo_write=True)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, render_item=render_item)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()


run()
