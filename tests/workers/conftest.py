"""A database, short leases, and a worker's desk whose children follow a script."""

import sys
import threading
from pathlib import Path

import pytest
import scripted_child

from service.db.engine import Database
from service.settings import Settings
from workers.tasks import Desk

COMMAND = (sys.executable, str(Path(scripted_child.__file__)))


@pytest.fixture
def settings(tmp_path):
    return Settings(
        data_dir=tmp_path / "data dir",
        lease_seconds=3,
        heartbeat_seconds=0.5,
        sweep_seconds=1,
        grace_seconds=2,
        shutdown_seconds=2,
        child_command=COMMAND,
        log_bytes_per_job=200_000,
    )


@pytest.fixture
def database(settings):
    settings.data_dir.mkdir(parents=True)
    database = Database(settings.database_url)
    database.migrate()
    yield database
    database.dispose()


@pytest.fixture
def stopping():
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def desk(settings, database, stopping):
    return Desk(settings, "worker-a", stopping)
