"""``erpo db``."""

import contextlib

import typer

app = typer.Typer(no_args_is_help=True, help="The database.")


@app.callback()
def _group() -> None:
    """Keeps `upgrade` a subcommand while it is the only one."""


@app.command()
def upgrade() -> None:
    """Bring the tables up to date; safe to repeat."""
    with open_database():
        print("The database is up to date.")


@contextlib.contextmanager
def open_database():
    """The database of the settings, with its tables up to date."""
    from service.db.engine import Database
    from service.settings import Settings

    settings = Settings()
    if settings.database_url.startswith("sqlite"):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    try:
        database.migrate()
        yield database
    finally:
        database.dispose()
