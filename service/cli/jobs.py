"""``erpo jobs``."""

import sys
from typing import Annotated

import typer

from service.cli.connection import Url, connect, print_json

app = typer.Typer(no_args_is_help=True, help="List, read and stop jobs.")
JobId = Annotated[str, typer.Argument(help="job_...")]


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only this status.")] = None,
    kind: Annotated[str | None, typer.Option(help="train, evaluate, entropy, perturbation or branch.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    url: Url = None,
) -> None:
    """The newest jobs."""
    from rich.console import Console
    from rich.table import Table

    with connect(url) as client:
        rows = client.jobs.list(status=status, kind=kind, limit=limit)["data"]
    table = Table(header_style="bold")
    for title in ("job", "kind", "name", "status", "progress", "created"):
        table.add_column(title, no_wrap=title in ("job", "status"))
    for job in rows:
        progress = job.get("progress") or {}
        done = f"{progress['done']}/{progress['total']}" if progress.get("total") else ""
        table.add_row(job["id"], job["kind"], job["name"] or "", job["status"], done, job["created_at"])
    # Ids are there to be copied: a narrow pipe must not cut them.
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


@app.command()
def get(job_id: JobId, url: Url = None) -> None:
    """One job as JSON."""
    with connect(url) as client:
        print_json(client.jobs.get(job_id))


@app.command()
def cancel(
    job_id: JobId,
    now: Annotated[bool, typer.Option("--now", help="Do not write a checkpoint first.")] = False,
    url: Url = None,
) -> None:
    """Stop a job."""
    with connect(url) as client:
        job = client.jobs.cancel(job_id, "now" if now else "checkpoint")
    print(job["status"])


@app.command()
def logs(job_id: JobId, url: Url = None) -> None:
    """The job's log."""
    with connect(url) as client:
        text = client.jobs.logs(job_id)
    sys.stdout.write(text if isinstance(text, str) else text.decode(errors="replace"))
