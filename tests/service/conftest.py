"""The API over HTTP on a test's database, and jobs in any state."""

import contextlib
import threading
import time

import httpx
import pytest
import uvicorn
from db_rows import call, claim, finish, job_of, store, submit

from erpo_core.records import Progress
from service.app import create_app
from service.db import jobs
from service.settings import Settings


@contextlib.contextmanager
def _serving(settings: Settings, leaving: list[threading.Thread]):
    """A client of a server of this process that listens on a port of its own."""
    folder = settings.data_root
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sums.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n' * 3)
    config = uvicorn.Config(create_app(settings), port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        leaving.append(thread)


@pytest.fixture(scope="session")
def serving():
    """``with serving(settings) as client``. A server takes 0.2 s to leave: the next test does not wait for it."""
    leaving = []
    yield lambda settings: _serving(settings, leaving)
    for thread in leaving:
        thread.join(20)
        assert not thread.is_alive(), "a server did not leave"


@pytest.fixture
def serve(database, tmp_path, serving):
    """Serves the test's database, with settings of its own; gives a client."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            serving(Settings(data_dir=tmp_path, database_url=database.url, **settings))
        )


@pytest.fixture
def api(serve):
    """A client of the API on the test's database."""
    return serve()


@pytest.fixture
def job_in(database):
    """Makes a job of the given status."""

    def make(status: str, kind: str = "train", owner: str | None = None):
        job = submit(database, kind, owner=owner, priority=0 if status == "queued" else 9)
        if status == "queued":
            return job_of(database, job.id)
        owned = claim(database)
        assert owned.job_id == job.id
        if status != "starting":
            store(database, owned, Progress("train", 1, 10))
        if status in ("pausing", "cancelling"):
            call(database, jobs.request_pause if status == "pausing" else jobs.request_cancel, job.id)
        elif status not in ("starting", "running"):
            finish(database, owned, status)
        return job_of(database, job.id)

    return make
