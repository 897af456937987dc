"""Live events. One task per process watches the jobs that somebody listens to; listeners only touch memory.

Every 250 ms one query asks for the event counters of the subscribed jobs. What is new is read once per job and kept in
a short window that all listeners of the job share; a listener that is behind the window catches up from the database.
"""

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from service.db import events as event_rows
from service.db import jobs as job_rows
from service.db.engine import Database
from service.shape import event_json

log = logging.getLogger(__name__)
POLL_SECONDS = 0.25
PING_SECONDS = 15.0
_WINDOW = 500
_BATCH = 500

Envelope = dict[str, Any]


@dataclass
class _Channel:
    """One job that somebody listens to: its latest events, contiguous by ``seq``, and a flag for each listener."""

    seen: int | None = None
    listeners: list[asyncio.Event] = field(default_factory=list)
    window: deque[Envelope] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def wake(self) -> None:
        for listener in self.listeners:
            listener.set()


class EventHub:
    """The fan-out of one process."""

    def __init__(self, database: Database, poll_seconds: float = POLL_SECONDS) -> None:
        self._database = database
        self._poll_seconds = poll_seconds
        self._channels: dict[str, _Channel] = {}
        self._task: asyncio.Task | None = None
        self._has_listeners = asyncio.Event()
        self._closing = False

    async def start(self) -> None:
        """Start watching. Called by the application's lifespan."""
        self._task = asyncio.create_task(self._watch(), name="event-fan-out")

    async def stop(self) -> None:
        """Stop watching; every stream ends."""
        self._closing = True
        for channel in self._channels.values():
            channel.wake()
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def follow(self, job_id: str, after: int = 0) -> AsyncIterator[Envelope | None]:
        """The job's events with ``seq > after`` without loss, until it has ended; None when nothing came for 15 s."""
        with self._listen(job_id) as (channel, changed):
            may_have_ended = True
            woken = False
            while not self._closing:
                changed.clear()
                events = await self._after(job_id, channel, after)
                for event in events:
                    after = event["seq"]
                    may_have_ended |= event["type"] == "job.status"
                    yield event
                if events:
                    woken = False
                    continue
                # Woken by events that are not for this listener, which asked for later ones: the end may be among them.
                if may_have_ended or woken:
                    may_have_ended, latest = await run_in_threadpool(self._state, job_id)
                    if may_have_ended and latest <= after:
                        return
                try:
                    await asyncio.wait_for(changed.wait(), PING_SECONDS)
                    woken = True
                except TimeoutError:
                    woken = False
                    yield None

    async def wait_until_terminal(self, job_id: str, seconds: float) -> bool:
        """Whether the job has ended, waiting for it at most ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for _ in self.follow(job_id):
                    pass
                return not self._closing
        return False

    async def stream(self, job_id: str, after: int = 0) -> AsyncIterator[str]:
        """The same as server-sent events, with a comment as sign of life and ``event: end`` at the end."""
        yield "retry: 1000\n\n"
        async for event in self.follow(job_id, after):
            if event is None:
                yield ": ping\n\n"
            else:
                body = json.dumps(event, separators=(",", ":"), allow_nan=False, default=str)
                yield f"id: {event['seq']}\nevent: {event['type']}\ndata: {body}\n\n"
        if not self._closing:
            yield "event: end\ndata: {}\n\n"

    @contextlib.contextmanager
    def _listen(self, job_id: str) -> Iterator[tuple[_Channel, asyncio.Event]]:
        channel = self._channels.setdefault(job_id, _Channel())
        changed = asyncio.Event()
        channel.listeners.append(changed)
        self._has_listeners.set()
        try:
            yield channel, changed
        finally:
            channel.listeners.remove(changed)
            if not channel.listeners and self._channels.get(job_id) is channel:
                del self._channels[job_id]

    async def _after(self, job_id: str, channel: _Channel, after: int) -> list[Envelope]:
        if channel.window and channel.window[0]["seq"] <= after + 1:
            return [event for event in channel.window if event["seq"] > after]
        if channel.seen is not None and channel.seen <= after:
            return []
        return await run_in_threadpool(self._read, job_id, after)

    async def _watch(self) -> None:
        while True:
            if not self._channels:
                self._has_listeners.clear()
                await self._has_listeners.wait()
            try:
                await self._look()
            except Exception:  # The database may be away for a while; the streams go on when it is back.
                log.exception("the event counters could not be read")
                await asyncio.sleep(2)
            await asyncio.sleep(self._poll_seconds)

    async def _look(self) -> None:
        latest = await run_in_threadpool(self._latest, list(self._channels))
        for job_id, seq in latest.items():
            channel = self._channels.get(job_id)
            if channel is None or channel.seen == seq:
                continue
            if channel.seen is None:
                channel.seen = seq
            else:
                for event in await run_in_threadpool(self._read, job_id, channel.seen):
                    channel.window.append(event)
                    channel.seen = event["seq"]
            channel.wake()

    def _latest(self, job_ids: list[str]) -> dict[str, int]:
        with self._database.read() as session:
            return event_rows.latest_seqs(session, job_ids)

    def _read(self, job_id: str, after: int) -> list[Envelope]:
        with self._database.read() as session:
            return [event_json(row) for row in event_rows.list_events(session, job_id, after_seq=after, limit=_BATCH)]

    def _state(self, job_id: str) -> tuple[bool, int]:
        with self._database.read() as session:
            job = job_rows.get_job(session, job_id)
            return job.is_terminal, event_rows.latest_seqs(session, [job_id]).get(job_id, 0)
