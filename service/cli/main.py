"""The ``erpo`` command. Each subcommand imports what it needs when it runs, so that ``erpo --help`` is quick."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train reasoning models with ERPO, evaluate them, and see token by token where they hesitate.",
)
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default: ERPO_PORT, or a free one.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", file_okay=False, help="Default: ERPO_DATA_DIR or erpo-data.")
]


def settings_for(data_dir: Path | None = None):
    """The settings of this process, with the data directory that the command line names, if any."""
    from service.settings import Settings

    return Settings() if data_dir is None else Settings(data_dir=data_dir)


@app.command()
def up(data_dir: DataDir = None, port: Port = None) -> None:
    """Start the whole service on this machine: API, worker, broker, database."""
    from service.cli.up import up as run_up

    run_up(settings_for(data_dir), port=port)


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    data_dir: DataDir = None,
    port: Port = None,
    stay: Annotated[bool | None, typer.Option(help="Keep serving afterwards; default: in a terminal.")] = None,
) -> None:
    """Train, evaluate and analyse a real model through the HTTP API, and show the result."""
    from service.cli.demo import STEPS
    from service.cli.demo import demo as run_demo

    run_demo(settings_for(data_dir), steps=steps or STEPS, port=port, stay=stay)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Default: ERPO_HOST.")] = None,
    port: Port = None,
) -> None:
    """Run the API alone; database and broker come from ERPO_DATABASE_URL and ERPO_BROKER_URL."""
    import uvicorn

    settings = settings_for()
    uvicorn.run(
        "service.app:create_app", factory=True, host=host or settings.host, port=port or settings.port, access_log=False
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def worker(context: typer.Context) -> None:
    """Become a Celery worker; further arguments are Celery's own."""
    import os

    from service.cli.up import worker_command

    command = [*worker_command(settings_for()), *context.args]
    os.execv(command[0], command)


def _add_groups() -> None:
    from service.cli import data, db, jobs, keys, train

    app.command("train")(train.train)
    app.add_typer(data.app, name="data")
    app.add_typer(jobs.app, name="jobs")
    app.add_typer(keys.app, name="keys")
    app.add_typer(db.app, name="db")


_add_groups()

if __name__ == "__main__":
    app()
