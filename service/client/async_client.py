"""The asynchronous client: the methods of :mod:`service.client.sync_client` as coroutines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any, Self

import httpx

from service.client import protocol
from service.client.calls import GROUPS, submit
from service.client.errors import ErpoApiError, JobFailed
from service.client.protocol import Call, Deadline, EventParser, Patience

Event = dict[str, Any]
Json = Any


class AsyncGroup:
    """The methods of one class of :mod:`service.client.calls` as coroutines."""

    def __init__(self, calls: Any, send: Callable[[Call], Awaitable[Json]]) -> None:
        self._calls, self._send = calls, send

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Json]]:
        build = getattr(self._calls, name)

        @wraps(build)
        async def method(*args: Any, **kwargs: Any) -> Json:
            return await self._send(build(*args, **kwargs))

        return method

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._calls) if not name.startswith("_")]


class AsyncErpoClient:
    """Talks to one service; arguments as those of :class:`service.client.ErpoClient`."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)
        self.jobs = AsyncGroup(GROUPS["jobs"](), self.send)
        self.runs = AsyncGroup(GROUPS["runs"](), self.send)
        self.evaluations = AsyncGroup(GROUPS["evaluations"](), self.send)
        self.entropy = AsyncGroup(GROUPS["entropy"](), self.send)
        self.perturbation = AsyncGroup(GROUPS["perturbation"](), self.send)
        self.branch = AsyncGroup(GROUPS["branch"](), self.send)
        self.datasets = AsyncGroup(GROUPS["datasets"](), self.send)
        self.registries = AsyncGroup(GROUPS["registries"](), self.send)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, request: Call) -> Json:
        """Send a request, again if need be; returns its decoded body.

        Raises:
            ErpoApiError: with the problem document.
        """
        response = protocol.checked(await self._send(request))
        kind = response.headers.get("content-type", "")
        if response.status_code == 204:
            return None
        if kind.startswith("application/json"):
            return response.json()
        return response.text if kind.startswith("text/") else response.content

    async def train(self, *, model: Any, dataset: str, job: dict | None = None, **spec: Any) -> "AsyncJobHandle":
        """Order a training."""
        return await self._submit("/jobs/train", {"model": model, "dataset": dataset, **spec}, job)

    async def evaluate(self, *, model: Any, dataset: str, job: dict | None = None, **spec: Any) -> "AsyncJobHandle":
        """Order an evaluation."""
        return await self._submit("/jobs/evaluate", {"model": model, "dataset": dataset, **spec}, job)

    async def analyze_entropy(self, *, model: Any, job: dict | None = None, **spec: Any) -> "AsyncJobHandle":
        """Order an entropy analysis."""
        return await self._submit("/analyze/entropy", {"model": model, **spec}, job)

    async def analyze_perturbation(
        self, *, model: Any, dataset: str, job: dict | None = None, **spec: Any
    ) -> "AsyncJobHandle":
        """Order a perturbation of right answers."""
        return await self._submit("/analyze/perturbation", {"model": model, "dataset": dataset, **spec}, job)

    async def analyze_branch(
        self, *, model: Any, sequence: str, position: int, job: dict | None = None, **spec: Any
    ) -> "AsyncJobHandle":
        """Order the branches of one token of a stored sequence."""
        body = {"model": model, "sequence": sequence, "position": position, **spec}
        return await self._submit("/analyze/branch", body, job)

    async def estimate(self, path: str, **spec: Any) -> Json:
        """Validate and estimate an order; nothing is queued."""
        return await self.send(submit(path, spec, dry_run=True))

    async def job(self, job_id: str) -> "AsyncJobHandle":
        """The handle of an existing job."""
        return AsyncJobHandle(self, await self.jobs.get(job_id))

    async def stream_events(self, job_id: str, *, after: int = 0, timeout: float | None = None) -> AsyncIterator[Event]:
        """The job's events from ``after`` on, until it ends; reconnects, and polls where streaming does not work.

        Of a job that has not ended after ``timeout`` seconds, no more come.
        """
        parser, deadline, failures = EventParser(last_seq=after), Deadline(timeout), 0
        while not parser.ended and not deadline.is_over:
            before = parser.last_seq
            try:
                async for event in self._stream(job_id, parser, deadline):
                    yield event
                failures = 0 if parser.last_seq > before else failures + 1
            except httpx.HTTPError as error:
                failures = 0 if parser.last_seq > before else failures + 1
                if failures >= protocol.MAX_TRIES:
                    raise protocol.unreachable(error, self.base_url) from error
            if not parser.ended:
                async for event in self._poll(job_id, parser):
                    yield event
                await asyncio.sleep(deadline.pause(failures))

    async def _stream(self, job_id: str, parser: EventParser, deadline: Deadline) -> AsyncIterator[Event]:
        if deadline.is_near:
            return
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(parser.last_seq)}
        timeout = deadline.timeout()
        async with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers, timeout=timeout) as response:
            if not response.is_success:
                await response.aread()
                if response.status_code in protocol.RETRIED:
                    return
                protocol.checked(response)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                return
            async for line in response.aiter_lines():
                for event in parser.feed(line):
                    yield event
                if parser.ended or deadline.is_near:
                    return

    async def _poll(self, job_id: str, parser: EventParser) -> AsyncIterator[Event]:
        try:
            is_terminal = (await self.jobs.get(job_id))["is_terminal"]
            while True:
                page = await self.jobs.events(job_id, after=parser.last_seq)
                for event in page["data"]:
                    parser.last_seq = event["seq"]
                    yield event
                if not page["has_more"]:
                    break
        except ErpoApiError as error:
            if error.status and error.status not in protocol.RETRIED:
                raise
            return
        parser.ended = is_terminal

    async def _submit(self, path: str, body: dict[str, Any], options: dict | None) -> "AsyncJobHandle":
        if options:
            body = {**body, "job": options}
        return AsyncJobHandle(self, await self.send(submit(path, body)))

    async def _send(self, request: Call) -> httpx.Response:
        patience = Patience(request)
        while True:
            try:
                response = await self._http.request(**request.arguments())
            except httpx.TransportError as error:
                pause = patience.pause(None)
                if pause is None:
                    raise protocol.unreachable(error, self.base_url) from error
            else:
                pause = patience.pause(response)
                if pause is None:
                    return response
            await asyncio.sleep(pause)


class AsyncJobHandle:
    """A job as last seen."""

    def __init__(self, client: AsyncErpoClient, job: dict[str, Any]) -> None:
        self._client = client
        self.data = job
        self.id: str = job["id"]
        self.run_id: str = job["run_id"]
        self.run_ids: list[str] = job["run_ids"]

    @property
    def status(self) -> str:
        """Its status when last seen."""
        return self.data["status"]

    @property
    def is_terminal(self) -> bool:
        """Whether it had ended when last seen."""
        return self.data["is_terminal"]

    async def refresh(self) -> Self:
        """Read the job again."""
        self.data = await self._client.jobs.get(self.id)
        return self

    async def run(self) -> dict[str, Any]:
        """The run: summary and result."""
        return await self._client.runs.get(self.run_id)

    def events(self, *, after: int = 0, timeout: float | None = None) -> AsyncIterator[Event]:
        """Its events, live until it ends, or for ``timeout`` seconds."""
        return self._client.stream_events(self.id, after=after, timeout=timeout)

    async def wait(
        self,
        *,
        on_event: Callable[[Event], object] | None = None,
        timeout: float | None = None,
        raise_on_failure: bool = False,
    ) -> Self:
        """Wait until the job has ended; see :meth:`service.client.JobHandle.wait`."""
        deadline = Deadline(timeout)
        if on_event is None:
            await self._poll_until_terminal(deadline)
        else:
            async for event in self.events(timeout=timeout):
                on_event(event)
                if deadline.is_over:
                    break
        await self.refresh()
        if deadline.is_over and not self.is_terminal:
            raise TimeoutError(f"job {self.id} is still {self.status}")
        if raise_on_failure and self.status != "succeeded":
            raise JobFailed(self.data)
        return self

    async def cancel(self, mode: str = "checkpoint") -> Self:
        """Stop it."""
        self.data = await self._client.jobs.cancel(self.id, mode)
        return self

    async def pause(self) -> Self:
        """Write a checkpoint and stop until :meth:`resume`."""
        self.data = await self._client.jobs.pause(self.id)
        return self

    async def resume(self) -> Self:
        """Go on with the paused job."""
        self.data = await self._client.jobs.resume(self.id)
        return self

    async def retry(self) -> Self:
        """Queue the failed or cancelled job again."""
        self.data = await self._client.jobs.retry(self.id)
        return self

    async def _poll_until_terminal(self, deadline: Deadline) -> None:
        while not (await self.refresh()).is_terminal and not deadline.is_over:
            await asyncio.sleep(min(protocol.POLL_SECONDS, deadline.left))
