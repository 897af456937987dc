"""``erpo data-import``."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.connection import Url, connect, print_json


def data_import(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL with `problem` and `answer`.")],
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: the file's.")] = None,
    url: Url = None,
) -> None:
    """Upload a data set; every line is checked."""
    with connect(url) as client:
        print_json(client.datasets.upload(file.name, file.read_bytes(), name or file.stem))
