"""What both clients share and what needs no network: requests as values, retry rules, answers, server-sent events."""

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from service.client.errors import ErpoApiError

RETRIED = {408, 425, 429, 500, 502, 503, 504}
MAX_TRIES = 5
IN_PROGRESS_SECONDS = 600.0
"""How long a request is sent again while the service works on it: what it answers then is no refusal."""
POLL_SECONDS = 0.5
SILENCE_SECONDS = 20.0
"""A stream may be silent almost as long: the service sends a comment every 15 s."""


@dataclass(frozen=True)
class Call:
    """One request. A POST carries one idempotency key over all its tries, so that a lost answer repeats nothing."""

    method: str
    path: str
    params: dict[str, Any] = field(default_factory=dict)
    json: Any = None
    files: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``httpx.Client.request``."""
        params = {name: value for name, value in self.params.items() if value is not None}
        arguments: dict[str, Any] = {"method": self.method, "url": self.path, "params": params}
        arguments["headers"] = self.headers
        if self.json is not None:
            arguments["json"] = self.json
        if self.files is not None:
            arguments["files"] = self.files
        return arguments


def call(
    method: str,
    path: str,
    *,
    json: Any = None,
    files: Any = None,
    accept: str | None = None,
    repeated: Mapping[str, Sequence[str]] | None = None,
    **params: Any,
) -> Call:
    """Build a request; a POST gets its idempotency key here. ``repeated`` are parameters that come once a value."""
    headers = {"Accept": accept or "application/json"}
    if method == "POST":
        headers["Idempotency-Key"] = uuid4().hex
    query = {name: _parameter(value) for name, value in params.items()}
    query |= {name: list(values) for name, values in (repeated or {}).items()}
    return Call(method, path, query, json, files, headers)


def _parameter(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else value


class Patience:
    """Whether and when one request is sent again.

    Up to ``MAX_TRIES`` where it may succeed later. While an earlier try of it is being worked on, as long as
    ``IN_PROGRESS_SECONDS``: that one's answer is meant for this one too.
    """

    def __init__(self, request: Call) -> None:
        self._is_repeatable = request.method in ("GET", "POST")
        self._until = time.monotonic() + IN_PROGRESS_SECONDS
        self._failures = self._waits = 0

    def pause(self, response: httpx.Response | None) -> float | None:
        """Seconds to wait before the next try; None where there is none. ``response``: None if no answer came."""
        if response is not None and response.status_code == 409 and _code(response) == "idempotency_in_progress":
            self._waits += 1
            return pause_before(self._waits - 1, response) if time.monotonic() < self._until else None
        self._failures += 1
        may_succeed = response is None or response.status_code in RETRIED
        if not self._is_repeatable or not may_succeed or self._failures >= MAX_TRIES:
            return None
        return pause_before(self._failures - 1, response)


class Deadline:
    """When a wait is over; never, if ``seconds`` is None."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 at least."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return self.left <= 0

    @property
    def is_near(self) -> bool:
        """Whether a stream could be silent until then: it is polled from here on, for nobody can leave it meanwhile."""
        return self.left <= SILENCE_SECONDS

    def pause(self, failures: int) -> float:
        """Seconds until a stream that broke, or was left, is asked again."""
        return min(self.left, POLL_SECONDS if self.is_near else pause_before(min(failures, 3)))

    def timeout(self) -> httpx.Timeout:
        """Of a stream."""
        return httpx.Timeout(min(30.0, self.left), read=min(45.0, self.left))


def pause_before(attempt: int, response: httpx.Response | None = None) -> float:
    """Seconds to wait before the next try: what the service asks for, else exponential with jitter."""
    if response is not None:
        asked = response.headers.get("Retry-After", "")
        if asked.isdigit():
            return min(float(asked), 30.0)
    return min(0.2 * 2**attempt, 5.0) * random.uniform(0.5, 1.0)


def _code(response: httpx.Response) -> str:
    try:
        return response.json().get("code", "")
    except ValueError:
        return ""


def checked(response: httpx.Response) -> httpx.Response:
    """The response itself.

    Raises:
        ErpoApiError: it is an error.
    """
    if response.is_success:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = {"title": response.reason_phrase, "detail": response.text[:500], "status": response.status_code}
    raise ErpoApiError(response.status_code, problem)


def unreachable(error: httpx.HTTPError, base_url: str) -> ErpoApiError:
    """The error of a request that got no answer."""
    detail = f"{base_url} does not answer: {error}"
    return ErpoApiError(0, {"code": "unreachable", "title": "no answer", "detail": detail})


@dataclass
class EventParser:
    """Server-sent events from lines. ``last_seq`` is where a new stream has to go on."""

    last_seq: int = 0
    ended: bool = False
    _data: list[str] = field(default_factory=list)
    _type: str = ""

    def feed(self, line: str) -> Iterator[dict[str, Any]]:
        """Take one line; yields the event that it completes, if any."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._type = value
            return
        kind, data = self._type, "\n".join(self._data)
        self._type, self._data = "", []
        if kind == "end":
            self.ended = True
        elif data:
            event = json.loads(data)
            self.last_seq = max(self.last_seq, event.get("seq", 0))
            yield event
