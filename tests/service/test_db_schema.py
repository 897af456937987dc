"""The tables: migrations, types and identifiers, the same on both databases."""

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from erpo_core.errors import ConflictError, NotFoundError, UnavailableError
from service.db import engine as engine_module
from service.db.engine import Database
from service.db.ids import new_id
from service.db.jobs import create_job, get_job, get_run, lock_job, set_status, update_job
from service.db.models import Base, LogChunk
from service.db.types import UtcDateTime, storable


def test_the_migrations_make_exactly_the_tables_of_the_models(database):
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


@pytest.mark.postgres
def test_both_databases_have_the_same_columns_keys_and_indexes(tmp_path, postgres_url):
    shapes = []
    for url in (f"sqlite:///{tmp_path / 'erpo.db'}", postgres_url):
        database = Database(url)
        database.migrate()
        shapes.append(shape(database))
        database.dispose()
    assert shapes[0] == shapes[1]
    assert set(shapes[0]) == {*Base.metadata.tables, "alembic_version"}


def shape(database) -> dict:
    seen = inspect(database.engine)
    return {
        table: {
            "columns": sorted((column["name"], column["nullable"]) for column in seen.get_columns(table)),
            "primary key": seen.get_pk_constraint(table)["constrained_columns"],
            "unique": sorted(sorted(unique["column_names"]) for unique in seen.get_unique_constraints(table)),
            "foreign": sorted(
                (*key["constrained_columns"], key["referred_table"]) for key in seen.get_foreign_keys(table)
            ),
            "indexes": sorted(tuple(i["column_names"]) for i in seen.get_indexes(table) if not i["unique"]),
        }
        for table in seen.get_table_names()
    }


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_processes_that_migrate_an_empty_database_at_once_wait_for_each_other(kind, tmp_path, request):
    on_postgres = kind == "postgresql"
    url = request.getfixturevalue("postgres_url") if on_postgres else f"sqlite:///{tmp_path / 'new.db'}"
    code = "import sys; from service.db.engine import Database; Database(sys.argv[1]).migrate()"
    processes = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_migrating_again_keeps_what_is_stored(database):
    with database.write() as session:
        job_id = create_job(session, kind="train", spec={"model": "m"}, options={}).id
    database.migrate()
    with database.read() as session:
        assert get_job(session, job_id).status == "queued"


def test_sqlite_is_in_wal_mode_with_foreign_keys_and_a_patient_lock(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'with space' / 'erpo.db'}")
    with database.read() as session:
        found = [session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "foreign_keys", "busy_timeout")]
    assert found == ["wal", 1, 30_000]
    database.dispose()


def test_foreign_keys_hold(database):
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(LogChunk(job_id="job_none", offset=0, attempt=1, data=b"x"))


def test_changes_of_one_row_at_the_same_time_are_all_kept(database):
    def add():
        for _ in range(10):
            with database.write() as session:
                lock_job(session, job_id).priority += 1

    with database.write() as session:
        job_id = create_job(session, kind="train", spec={"model": "m"}, options={}).id
    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with database.read() as session:
        assert get_job(session, job_id).priority == 40


def test_a_full_pool_is_unavailable_after_its_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "POOL_SIZE", 1)
    monkeypatch.setattr(engine_module, "POOL_TIMEOUT_SECONDS", 0.1)
    database = Database(f"sqlite:///{tmp_path / 'erpo.db'}")
    with database.read() as holder:
        holder.execute(text("SELECT 1"))
        with pytest.raises(UnavailableError):
            count_jobs(database)
    database.dispose()


def count_jobs(database) -> int:
    with database.read() as session:
        return session.scalar(text("SELECT count(*) FROM jobs"))


def test_what_is_read_is_not_written_and_what_fails_is_not_kept(database):
    with database.write() as session:
        job_id = create_job(session, kind="train", spec={"model": "m"}, options={"name": "one"}).id
    with database.read() as session:
        get_job(session, job_id).name = "two"
    with pytest.raises(ConflictError):
        rename_and_break(database, job_id)
    with database.read() as session:
        assert get_job(session, job_id).name == "one"


def rename_and_break(database, job_id) -> None:
    with database.write() as session:
        job = update_job(session, job_id, name="three")
        set_status(session, job, "succeeded")


def test_rows_can_be_read_after_their_session(database):
    with database.write() as session:
        job = create_job(session, kind="train", spec={"model": "m"}, options={"tags": ["a"]})
    assert (job.status, job.tags, job.created_at.tzinfo) == ("queued", ["a"], UTC)


def test_times_keep_their_microseconds_and_are_stored_as_integers(database):
    time = datetime(2026, 2, 3, 4, 5, 6, 789_012, tzinfo=UTC)
    with database.write() as session:
        job = create_job(session, kind="train", spec={"model": "m"}, options={})
        job.started_at = time
    with database.read() as session:
        assert get_job(session, job.id).started_at == time
        assert session.scalar(text("SELECT started_at FROM jobs")) == 1_770_091_506_789_012


@given(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)))  # noqa: DTZ001
def test_every_time_survives(moment):
    moment = moment.replace(tzinfo=UTC)
    kind = UtcDateTime()
    assert kind.process_result_value(kind.process_bind_param(moment, None), None) == moment


def test_texts_that_a_model_may_write_can_be_stored(database):
    odd = "a\0b \ud800 é 🙂"
    with database.write() as session:
        job = create_job(session, kind="train", spec={"model": "m", "texts": [odd, {odd: odd}]}, options={"name": odd})
    mended = "a\ufffdb \ufffd é 🙂"
    with database.read() as session:
        assert get_job(session, job.id).name == mended
        assert get_run(session, job.run_id).spec["texts"] == [mended, {mended: mended}]
        assert get_job(session, job.id).status == "queued"
    with database.read() as session, pytest.raises(NotFoundError):
        get_job(session, "job_\0")


@given(st.recursive(st.none() | st.integers() | st.text(), lambda t: st.lists(t) | st.dictionaries(st.text(), t)))
def test_what_is_mended_can_be_encoded_and_stays_as_it_is(value):
    mended = storable(value)
    assert storable(mended) == mended
    json.dumps(mended, ensure_ascii=False).encode()


def test_ids_tell_their_kind_and_sort_by_creation():
    ids = [new_id("job") for _ in range(5000)]
    assert ids == sorted(set(ids))
    assert all(len(name) == 36 and name.startswith("job_") and name[16] == "7" and name[20] in "89ab" for name in ids)


@pytest.mark.postgres
def test_postgresql_keeps_traces_so_that_a_range_can_be_read(postgres_database):
    query = text("SELECT attstorage FROM pg_attribute WHERE attrelid = 'trace_blobs'::regclass AND attname = 'data'")
    with postgres_database.read() as session:
        assert session.scalar(query) == "e"
