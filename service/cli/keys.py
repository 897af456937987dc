"""``erpo keys``."""

from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="API keys.")


class Scope(StrEnum):
    """What a key allows; each includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@app.callback()
def _group() -> None:
    """Keeps `create` a subcommand while it is the only one."""


@app.command()
def create(
    scope: Annotated[Scope, typer.Option(help="What the key allows.")],
    name: Annotated[str | None, typer.Option(help="For your own memory.")] = None,
) -> None:
    """Make a key and show it, this once: only its hash is stored."""
    from service.db import keys
    from service.db.engine import Database
    from service.settings import Settings

    database = Database(Settings().database_url)
    try:
        with database.write() as session:
            print(keys.create_key(session, scope=scope.value, name=name))
    finally:
        database.dispose()
