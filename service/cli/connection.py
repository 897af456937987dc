"""How commands that use the API find the service."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Url = Annotated[
    str | None, typer.Option("--url", envvar="ERPO_URL", help="Default: the service on ERPO_DATA_DIR, else port 8000.")
]


@contextmanager
def connect(url: str | None) -> Iterator[Any]:
    """A client of the service; what the service refuses ends the command with its message.

    The key, where one is needed, is ERPO_API_KEY.
    """
    from service.client import ErpoApiError, ErpoClient

    with ErpoClient(url or _local_url(), os.environ.get("ERPO_API_KEY")) as client:
        try:
            yield client
        except ErpoApiError as error:
            raise SystemExit(f"erpo: {error}") from None


def _local_url() -> str:
    from service.cli.datadir import read_server
    from service.settings import Settings

    settings = Settings()
    server = read_server(settings.data_dir)
    return server["url"] if server else f"http://{settings.host}:{settings.port}"


def print_json(value: Any) -> None:
    """Indented JSON for people and pipes."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
