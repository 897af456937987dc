"""Rings the workers. A message is only a doorbell: one that is lost costs a sweep, never a job.

Messages are sent by a thread of their own, so that a broker that is slow or away never holds a request back.
"""

import contextlib
import logging
import queue
import threading

import redis
from celery import Celery

from service.settings import RING_TASK

log = logging.getLogger(__name__)
_BACKLOG = 1000
_TIMEOUT_SECONDS = 3.0


class Publisher:
    """Sends ``RING_TASK`` with a job id. Without a broker URL it does nothing."""

    def __init__(self, broker_url: str, queue_name: str = "default") -> None:
        self.broker_url = broker_url
        self._queue_name = queue_name
        self._waiting: queue.Queue[str | None] = queue.Queue(_BACKLOG)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def ring(self, job_id: str) -> None:
        """Tell the workers to look at the queue. Returns at once and never fails."""
        if not self.broker_url:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="publisher", daemon=True)
                self._thread.start()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(job_id)

    def close(self) -> None:
        """Stop the thread; what has not been sent is left to the sweeper."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        thread.join(_TIMEOUT_SECONDS)

    def is_reachable(self) -> bool:
        """Whether the broker answers. Without one there is nothing to reach: false."""
        if not self.broker_url:
            return False
        client = redis.Redis.from_url(self.broker_url, socket_connect_timeout=1, socket_timeout=1)
        try:
            return bool(client.ping())
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()

    def _send_all(self) -> None:
        celery = Celery("erpo", broker=self.broker_url, set_as_current=False)
        celery.conf.update(
            task_ignore_result=True,
            broker_transport_options={
                "socket_connect_timeout": _TIMEOUT_SECONDS,
                "socket_timeout": _TIMEOUT_SECONDS,
                # A broker that is away holds neither the later messages back nor the end of the process.
                "max_retries": 0,
            },
        )
        while (job_id := self._waiting.get()) is not None:
            try:
                celery.send_task(RING_TASK, args=[job_id], queue=self._queue_name, retry=False, ignore_result=True)
            except Exception as error:  # A broker has many ways to be away; the sweeper rings for all of them.
                log.warning("job %s was not announced to the workers: %s", job_id, error)
        celery.close()
