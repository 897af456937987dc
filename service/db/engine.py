"""The database: SQLite in WAL mode, or PostgreSQL. One synchronous layer for API and workers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from erpo_core.errors import UnavailableError

POOL_SIZE = 20
POOL_TIMEOUT_SECONDS = 5
BUSY_TIMEOUT_SECONDS = 30


class Database:
    """Sessions of one database. Rows stay readable after their session."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _make_engine(url)
        self._writer = self.engine.execution_options(erpo_write=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session whose changes are thrown away.

        Raises:
            UnavailableError: no connection came free in time.
        """
        with self._session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at its end. On SQLite it holds the write lock from its start.

        Raises:
            UnavailableError: no connection came free in time.
        """
        with self._session(self._writer) as session:
            yield session
            session.commit()

    @contextmanager
    def _session(self, engine: Engine) -> Iterator[Session]:
        session = Session(engine, expire_on_commit=False)
        try:
            yield session
        except PoolTimeout as error:
            raise UnavailableError("the database has no free connection", code="database_unavailable") from error
        finally:
            session.close()

    def migrate(self) -> None:
        """Bring the tables to the newest revision."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.attributes["engine"] = self.engine
        command.upgrade(config, "head")

    def dispose(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _make_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(
            parsed,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            json_serializer=_json,
        )
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed,
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS},
        json_serializer=_json,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _prepare_sqlite(connection, _record) -> None:
    # The driver's own transactions begin too late for a lock at the start: ours are begun below.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection) -> None:
    write = connection.get_execution_options().get("erpo_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
