"""The synchronous client."""

import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Self

import httpx

from service.client import protocol
from service.client.calls import GROUPS, submit
from service.client.errors import ErpoApiError, JobFailed
from service.client.protocol import Call, Deadline, EventParser, Patience

Event = dict[str, Any]
Json = Any


class Group:
    """The methods of one class of :mod:`service.client.calls`, each sent at once; they return the decoded answer."""

    def __init__(self, calls: Any, send: Callable[[Call], Json]) -> None:
        self._calls, self._send = calls, send

    def __getattr__(self, name: str) -> Callable[..., Json]:
        build = getattr(self._calls, name)

        @wraps(build)
        def method(*args: Any, **kwargs: Any) -> Json:
            return self._send(build(*args, **kwargs))

        return method

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._calls) if not name.startswith("_")]


class ErpoClient:
    """Talks to one service. Sends idempotency keys, tries again where that is safe.

    Args:
        base_url: ``http://127.0.0.1:8000``.
        api_key: bearer key; not needed on the loopback address of a service without keys.
        timeout: seconds a request may take.
        transport: an ``httpx`` transport, for tests.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)
        self.jobs = Group(GROUPS["jobs"](), self.send)
        self.runs = Group(GROUPS["runs"](), self.send)
        self.evaluations = Group(GROUPS["evaluations"](), self.send)
        self.entropy = Group(GROUPS["entropy"](), self.send)
        self.perturbation = Group(GROUPS["perturbation"](), self.send)
        self.branch = Group(GROUPS["branch"](), self.send)
        self.datasets = Group(GROUPS["datasets"](), self.send)
        self.registries = Group(GROUPS["registries"](), self.send)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, request: Call) -> Json:
        """Send a request, again if need be; returns its decoded body (text or bytes where it is not JSON).

        Raises:
            ErpoApiError: with the problem document.
        """
        response = protocol.checked(self._send(request))
        kind = response.headers.get("content-type", "")
        if response.status_code == 204:
            return None
        if kind.startswith("application/json"):
            return response.json()
        return response.text if kind.startswith("text/") else response.content

    def train(self, *, model: Any, dataset: str, job: dict | None = None, **spec: Any) -> "JobHandle":
        """Order a training (`POST /jobs/train`); the fields are the specification's."""
        return self._submit("/jobs/train", {"model": model, "dataset": dataset, **spec}, job)

    def evaluate(self, *, model: Any, dataset: str, job: dict | None = None, **spec: Any) -> "JobHandle":
        """Order an evaluation (`POST /jobs/evaluate`)."""
        return self._submit("/jobs/evaluate", {"model": model, "dataset": dataset, **spec}, job)

    def analyze_entropy(self, *, model: Any, job: dict | None = None, **spec: Any) -> "JobHandle":
        """Order an entropy analysis (`POST /analyze/entropy`) of ``prompts``, ``texts``, ``dataset``, ``source``."""
        return self._submit("/analyze/entropy", {"model": model, **spec}, job)

    def analyze_perturbation(self, *, model: Any, dataset: str, job: dict | None = None, **spec: Any) -> "JobHandle":
        """Order a perturbation of right answers (`POST /analyze/perturbation`)."""
        return self._submit("/analyze/perturbation", {"model": model, "dataset": dataset, **spec}, job)

    def analyze_branch(
        self, *, model: Any, sequence: str, position: int, job: dict | None = None, **spec: Any
    ) -> "JobHandle":
        """Order the branches of one token of a stored sequence (`POST /analyze/branch`)."""
        return self._submit(
            "/analyze/branch", {"model": model, "sequence": sequence, "position": position, **spec}, job
        )

    def estimate(self, path: str, **spec: Any) -> Json:
        """Validate and estimate an order (`?dry_run=true`); nothing is queued."""
        return self.send(submit(path, spec, dry_run=True))

    def job(self, job_id: str) -> "JobHandle":
        """The handle of an existing job."""
        return JobHandle(self, self.jobs.get(job_id))

    def stream_events(self, job_id: str, *, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """The job's events from ``after`` on, until it ends; reconnects, and polls where streaming does not work.

        Of a job that has not ended after ``timeout`` seconds, no more come.
        """
        parser, deadline, failures = EventParser(last_seq=after), Deadline(timeout), 0
        while not parser.ended and not deadline.is_over:
            before = parser.last_seq
            try:
                yield from self._stream(job_id, parser, deadline)
                failures = 0 if parser.last_seq > before else failures + 1
            except httpx.HTTPError as error:
                failures = 0 if parser.last_seq > before else failures + 1
                if failures >= protocol.MAX_TRIES:
                    raise protocol.unreachable(error, self.base_url) from error
            if not parser.ended:
                yield from self._poll(job_id, parser)
                time.sleep(deadline.pause(failures))

    def _stream(self, job_id: str, parser: EventParser, deadline: Deadline) -> Iterator[Event]:
        if deadline.is_near:
            return
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(parser.last_seq)}
        timeout = deadline.timeout()
        with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                if response.status_code in protocol.RETRIED:
                    return
                protocol.checked(response)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                return
            for line in response.iter_lines():
                yield from parser.feed(line)
                if parser.ended or deadline.is_near:
                    return

    def _poll(self, job_id: str, parser: EventParser) -> Iterator[Event]:
        """What a stream that broke has missed. The job is read first: then no later event can be its last."""
        try:
            is_terminal = self.jobs.get(job_id)["is_terminal"]
            while True:
                page = self.jobs.events(job_id, after=parser.last_seq)
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

    def _submit(self, path: str, body: dict[str, Any], options: dict | None) -> "JobHandle":
        if options:
            body = {**body, "job": options}
        return JobHandle(self, self.send(submit(path, body)))

    def _send(self, request: Call) -> httpx.Response:
        patience = Patience(request)
        while True:
            try:
                response = self._http.request(**request.arguments())
            except httpx.TransportError as error:
                pause = patience.pause(None)
                if pause is None:
                    raise protocol.unreachable(error, self.base_url) from error
            else:
                pause = patience.pause(response)
                if pause is None:
                    return response
            time.sleep(pause)


class JobHandle:
    """A job as last seen; :meth:`refresh` looks again."""

    def __init__(self, client: ErpoClient, job: dict[str, Any]) -> None:
        self._client = client
        self.data = job

    def __repr__(self) -> str:
        return f"JobHandle({self.id}, {self.status})"

    @property
    def id(self) -> str:
        """``job_...``."""
        return self.data["id"]

    @property
    def run_id(self) -> str:
        """``run_...``: what metrics, traces and results are read by."""
        return self.data["run_id"]

    @property
    def run_ids(self) -> list[str]:
        """All of them: an evaluation of several checkpoints has one for each."""
        return self.data["run_ids"]

    @property
    def status(self) -> str:
        """Its status when last seen."""
        return self.data["status"]

    @property
    def is_terminal(self) -> bool:
        """Whether it had ended when last seen."""
        return self.data["is_terminal"]

    @property
    def progress(self) -> dict[str, Any] | None:
        """Phase, done, total and what the job adds."""
        return self.data.get("progress")

    def refresh(self) -> Self:
        """Read the job again."""
        self.data = self._client.jobs.get(self.id)
        return self

    def run(self) -> dict[str, Any]:
        """The run: summary and result."""
        return self._client.runs.get(self.run_id)

    def events(self, *, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Its events, live until it ends, or for ``timeout`` seconds."""
        return self._client.stream_events(self.id, after=after, timeout=timeout)

    def wait(
        self,
        *,
        on_event: Callable[[Event], object] | None = None,
        timeout: float | None = None,
        raise_on_failure: bool = False,
    ) -> Self:
        """Wait until the job has ended; ``on_event`` gets every event.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds; it goes on.
            JobFailed: it ended otherwise than well, if ``raise_on_failure``.
        """
        deadline = Deadline(timeout)
        if on_event is None:
            self._poll_until_terminal(deadline)
        else:
            for event in self.events(timeout=timeout):
                on_event(event)
                if deadline.is_over:
                    break
        self.refresh()
        if deadline.is_over and not self.is_terminal:
            raise TimeoutError(f"job {self.id} is still {self.status}")
        if raise_on_failure and self.status != "succeeded":
            raise JobFailed(self.data)
        return self

    def cancel(self, mode: str = "checkpoint") -> Self:
        """Stop it: ``checkpoint`` writes one first, ``now`` does not."""
        self.data = self._client.jobs.cancel(self.id, mode)
        return self

    def pause(self) -> Self:
        """Write a checkpoint and stop until :meth:`resume`."""
        self.data = self._client.jobs.pause(self.id)
        return self

    def resume(self) -> Self:
        """Go on with the paused job."""
        self.data = self._client.jobs.resume(self.id)
        return self

    def retry(self) -> Self:
        """Queue the failed or cancelled job again."""
        self.data = self._client.jobs.retry(self.id)
        return self

    def _poll_until_terminal(self, deadline: Deadline) -> None:
        while not self.refresh().is_terminal and not deadline.is_over:
            time.sleep(min(protocol.POLL_SECONDS, deadline.left))
