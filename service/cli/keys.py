"""``erpo keys``."""

import contextlib
import sys
from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="API keys.")


class Scope(StrEnum):
    """What a key allows; each includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@app.command()
def create(
    scope: Annotated[Scope, typer.Option(help="What the key allows.")],
    owner: Annotated[str | None, typer.Option(help="Whose jobs it orders and sees.")] = None,
    name: Annotated[str | None, typer.Option(help="For your own memory.")] = None,
) -> None:
    """Make a key and show it, this once: only its hash is stored."""
    from service.db import keys

    with _writing() as session:
        key, secret = keys.create_key(session, scope=scope.value, owner=owner, name=name)
        session.flush()
        print(key.id, file=sys.stderr)
    print(secret)


@app.command("list")
def list_keys() -> None:
    """Every key; never a secret."""
    from service.db import keys

    with _writing() as session:
        for key in keys.list_keys(session):
            state = "revoked" if key.revoked_at else "valid"
            print(f"{key.id}  {key.scope:<6}  {state:<7}  {key.owner or '-'}  {key.name or ''}".rstrip())


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="key_...")]) -> None:
    """End a key."""
    from service.db import keys

    with _writing() as session:
        if not keys.revoke_key(session, key_id):
            raise SystemExit(f"erpo: there is no key {key_id}")


@contextlib.contextmanager
def _writing():
    """A transaction on the migrated database of the settings."""
    from service.cli.db import open_database

    with open_database() as database, database.write() as session:
        yield session
