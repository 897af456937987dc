"""What both clients share and what needs no network: requests as values, retry rules, answers, server-sent events."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from service.client.errors import ErpoApiError

RETRIED = {408, 425, 429, 500, 502, 503, 504}
MAX_TRIES = 5
POLL_SECONDS = 0.5


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


def is_worth_retrying(request: Call, response: httpx.Response) -> bool:
    """Whether the same request may succeed later."""
    in_flight = response.status_code == 409 and _code(response) == "idempotency_in_progress"
    repeatable = request.method in ("GET", "POST")
    return repeatable and (response.status_code in RETRIED or in_flight)


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
