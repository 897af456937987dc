"""API keys and idempotency keys."""

import threading
from datetime import timedelta

import pytest
from db_rows import call
from sqlalchemy import text

from erpo_core.errors import ConflictError, SpecError
from service.db import idempotency, keys
from service.db.datasets import create_dataset, get_dataset, list_datasets
from service.db.models import IdempotencyKey


def test_a_key_is_found_by_its_secret_which_is_not_stored(database):
    with database.write() as session:
        assert not keys.has_keys(session)
        key, secret = keys.create_key(session, scope="submit", owner="ann", name="laptop")
    with database.read() as session:
        found = keys.find_key(session, secret)
        assert (found.id, found.scope, found.owner, found.name) == (key.id, "submit", "ann", "laptop")
        assert keys.find_key(session, secret[:-1]) is None
        assert keys.find_key(session, "\0") is None
        assert secret not in str(session.execute(text("SELECT * FROM api_keys")).all())
        assert [row.id for row in keys.list_keys(session)] == [key.id]


def test_a_revoked_key_opens_nothing(database):
    with database.write() as session:
        key, secret = keys.create_key(session, scope="admin")
    assert call(database, keys.revoke_key, key.id)
    assert not call(database, keys.revoke_key, "key_none")
    with database.read() as session:
        assert keys.find_key(session, secret) is None
        assert not keys.has_keys(session)


ME = ("key_1", "abc")


def begin(database, fingerprint="f", principal=ME[0]):
    return call(database, idempotency.begin, principal, ME[1], fingerprint)


def test_the_first_request_takes_the_key_and_a_repeat_gets_its_answer(database):
    assert begin(database) is None
    call(database, idempotency.complete, *ME, status=202, body={"id": "job_1"})
    stored = begin(database)
    assert (stored.status, stored.body) == (202, {"id": "job_1"})


def test_another_request_with_the_same_key_is_refused(database):
    begin(database)
    with pytest.raises(SpecError) as refusal:
        begin(database, "other")
    assert refusal.value.code == "idempotency_key_reused"


def test_keys_of_different_callers_do_not_meet(database):
    assert begin(database) is None
    assert begin(database, "other", principal="key_2") is None


def test_a_repeat_while_the_first_still_runs_conflicts(database):
    begin(database)
    with pytest.raises(ConflictError) as refusal:
        begin(database)
    assert refusal.value.code == "idempotency_in_progress"


def test_a_key_given_back_may_be_taken_again(database):
    begin(database)
    call(database, idempotency.release, *ME)
    assert begin(database) is None
    call(database, idempotency.complete, *ME, status=200, body={})
    call(database, idempotency.release, *ME)
    assert begin(database).status == 200


def test_a_key_left_unfinished_is_taken_over_once_and_only_one_effect_is_kept(database):
    begin(database)
    age(database, timedelta(seconds=61))
    assert begin(database) is None
    with pytest.raises(ConflictError):
        begin(database)
    call(database, idempotency.complete, *ME, status=202, body={"id": "second"})
    with pytest.raises(ConflictError):
        call(database, idempotency.complete, *ME, status=202, body={"id": "first"})
    assert begin(database).body == {"id": "second"}


def test_a_key_is_forgotten_after_a_day(database):
    begin(database)
    call(database, idempotency.complete, *ME, status=202, body={})
    with database.write() as session:
        session.get_one(IdempotencyKey, ME).expires_at -= timedelta(hours=25)
    assert begin(database, "other") is None


def age(database, by: timedelta) -> None:
    with database.write() as session:
        session.get_one(IdempotencyKey, ME).created_at -= by


def test_of_requests_at_the_same_time_one_wins(database):
    results = []

    def take():
        try:
            results.append(begin(database))
        except ConflictError as error:
            results.append(error.code)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results, key=str) == [None, *["idempotency_in_progress"] * 5]


def test_uploaded_data_sets_are_listed_newest_first_to_their_owner(database):
    details = {"sha256": "0" * 64, "size_bytes": 10, "num_rows": 2}
    with database.write() as session:
        first = create_dataset(session, name="a", owner="ann", **details)
        second = create_dataset(session, name="b", owner=None, **details)
    with database.read() as session:
        assert get_dataset(session, first.id).num_rows == 2
        assert [row.id for row in list_datasets(session).rows] == [second.id, first.id]
        assert [row.id for row in list_datasets(session, owner="ann").rows] == [first.id]
