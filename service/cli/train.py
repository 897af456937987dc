"""``erpo train``."""

import json
import sys
from typing import Annotated

import typer

from service.cli.connection import Url, connect, print_json


def train(
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="JSON file with the body; - is standard input.")
    ] = None,
    body: Annotated[str | None, typer.Option("--body", help="The body itself.")] = None,
    wait: Annotated[bool, typer.Option(help="Show progress and wait for the end.")] = False,
    url: Url = None,
) -> None:
    """Order a training: the body of `POST /jobs/train`."""
    if (file is None) == (body is None):
        raise typer.BadParameter("give the body by --file or by --body")
    spec = read_body(file, body)
    with connect(url) as client:
        job = client.train(**spec)
        if not wait:
            print_json(job.data)
            return
        from rich.console import Console

        from service.cli.terminal.progress import job_progress
        from service.client import JobFailed

        with job_progress(Console(highlight=False), "training") as take:
            try:
                job.wait(on_event=take, raise_on_failure=True)
            except JobFailed as error:
                raise SystemExit(f"erpo: {error}") from None


def read_body(file: str | None, body: str | None) -> dict:
    """The body as an object.

    Raises:
        typer.BadParameter: it cannot be read, or is no JSON object with `model` and `dataset`.
    """
    try:
        if file is not None:
            with sys.stdin if file == "-" else open(file, encoding="utf-8") as source:
                body = source.read()
        spec = json.loads(body)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file or '--body'}: {error}") from None
    if not isinstance(spec, dict) or not {"model", "dataset"} <= spec.keys():
        raise typer.BadParameter("the body must be a JSON object that has at least `model` and `dataset`")
    return spec
