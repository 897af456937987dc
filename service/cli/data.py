"""``erpo data``: ``import`` and ``fetch`` write the data root of this machine, ``upload`` asks the API."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.connection import Url, connect, print_json

app = typer.Typer(no_args_is_help=True, help="Benchmarks and other problem files.")
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL with `problem` and `answer`.")]


@app.command("list")
def list_benchmarks() -> None:
    """The benchmarks by name, and whether their files are in this machine's data root."""
    from erpo_core.data.benchmarks import BENCHMARKS, is_present
    from service.settings import Settings

    root = Settings().data_root
    for name, row in sorted(BENCHMARKS.items()):
        here = "present" if is_present(row, root) else "absent "
        typer.echo(f"{name:<14}{row.num_problems:>6}  {here}  {row.license}")
    typer.echo(f"data root: {root}")


@app.command("import")
def import_(
    file: File,
    name: Annotated[str | None, typer.Option(help="A benchmark, or a name of your own; default: the file's.")] = None,
) -> None:
    """Put a file into the data root: as a benchmark, if it has the name of one, else as `data:<name>.jsonl`."""
    from erpo_core.data.store import import_file
    from service.settings import Settings

    with _told():
        _tell(import_file(file, Settings().data_root, name=name))


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="A benchmark: see `erpo data list`.")]) -> None:
    """Get a benchmark from the hub into the data root."""
    from erpo_core.data.store import fetch_benchmark
    from service.settings import Settings

    settings = Settings()
    with _told():
        _tell(fetch_benchmark(name, settings.data_root, cache_dir=settings.cache_dir))


@app.command()
def upload(
    file: File,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: the file's.")] = None,
    url: Url = None,
) -> None:
    """Upload a data set to the service; every line is checked."""
    with connect(url) as client:
        print_json(client.datasets.upload(file.name, file.read_bytes(), name or file.stem))


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong ends the command with its message."""
    from erpo_core.errors import ErpoError

    try:
        yield
    except ErpoError as error:
        mend = getattr(error, "mend", "")
        raise SystemExit(f"erpo: {error.message}" + (f"\n      {mend}" if mend else "")) from None


def _tell(stored: Any) -> None:
    typer.echo(f'{stored.num_problems} problems in {stored.path}; write "dataset": "{stored.dataset}"')
    if stored.num_text_golds:
        typer.echo(f"{stored.num_text_golds} of their answers hold no mathematics: only the same text is right")
    if stored.num_text_golds is None:
        typer.echo("math-verify is not installed here: the worker will read the answers")
