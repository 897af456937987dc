"""The Celery application: one task, one pool process, no results. The broker carries bells; the database is the truth.

Messages are acknowledged early and prefetched by one, so that a bell rings at a worker that has time for it. Nothing
here depends on the broker's visibility time-out.

    main process         consumes bells, and nothing else
      pool process       claims and supervises, one job at a time; threads that sweep, and poll when no bell comes
        child process    computes (``python -m workers.child``)

The pool process learns that the worker shall stop by a pipe that closes when the main process says so, or dies. The
main process never opens the database: a pool process forked from it would inherit SQLite's locks as nobody's.
"""

import logging
import os
import socket
import threading
import uuid

from celery import Celery, signals

from service.settings import RING_TASK, Settings
from workers.sweeper import Sweeper
from workers.tasks import Desk, start_thread

log = logging.getLogger(__name__)
_EXTRA_SECONDS = 3.0


class Worker:
    """The state of one worker over its two processes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.worker_id = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self.stopping = threading.Event()
        self.desk: Desk | None = None
        self._alarm: tuple[int, int] | None = None

    def before_fork(self) -> None:
        """Main process: open the pipe whose closing tells the pool process to stop."""
        self._alarm = os.pipe()

    def stop(self) -> None:
        """Main process: stop soon, and within bounds even if the broker is gone."""
        if self._alarm is not None:
            os.close(self._alarm[1])
            self._alarm = None
        bound = threading.Timer(self.settings.shutdown_seconds + _EXTRA_SECONDS, os._exit, [1])
        bound.daemon = True
        bound.start()

    def start_desk(self, celery: Celery) -> None:
        """Pool process: listen for the alarm, sweep, and poll."""

        def ring(job_id: str) -> None:
            celery.send_task(RING_TASK, args=[job_id], queue=self.settings.queues[0])

        self.desk = Desk(self.settings, self.worker_id, self.stopping)
        if self._alarm is not None:
            os.close(self._alarm[1])
            start_thread(self._await_alarm, "alarm")
        sweeper = Sweeper(self.settings, self.worker_id, ring)
        start_thread(lambda: sweeper.run(self.stopping), "sweeper")
        start_thread(self.desk.poll_until_stopped, "poll")

    def leave_desk(self) -> None:
        """Pool process, before it ends: a job that the poll started comes to its end as well."""
        self.stopping.set()
        if self.desk is not None:
            self.desk.wait_until_idle(self.settings.shutdown_seconds + _EXTRA_SECONDS)

    def _await_alarm(self) -> None:
        os.read(self._alarm[0], 1)
        self.stopping.set()


def make_app(settings: Settings) -> Celery:
    """The application of one worker process."""
    app = Celery("erpo", broker=settings.broker_url or None, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_keepalive": True, "health_check_interval": 30},
        task_acks_late=False,
        task_default_queue=settings.queues[0],
        task_ignore_result=True,
        task_serializer="json",
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_disable_prefetch=True,
        worker_hijack_root_logger=True,
        worker_prefetch_multiplier=1,
    )
    worker = Worker(settings)

    @app.task(name=RING_TASK, ignore_result=True)
    def ring(job_id: str | None = None) -> None:
        worker.desk.ring()

    _connect(app, worker)
    return app


def _connect(app: Celery, worker: Worker) -> None:
    signals.worker_init.connect(lambda **_: worker.before_fork(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: worker.stop(), weak=False)
    signals.worker_process_init.connect(lambda **_: worker.start_desk(app), weak=False)
    signals.worker_process_shutdown.connect(lambda **_: worker.leave_desk(), weak=False)


app = make_app(Settings())
