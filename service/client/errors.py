"""What the client raises."""

from typing import Any


class ErpoApiError(Exception):
    """The service refused a request. ``problem`` is its problem document (RFC 9457).

    ``status`` 0 means that no answer came: the service could not be reached.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.problem = problem
        self.code: str = problem.get("code", "error")
        self.errors: list[dict[str, str]] = problem.get("errors") or []
        lines = [f"{status} {self.code}: {problem.get('detail') or problem.get('title') or ''}"]
        lines += [f"  {e.get('pointer') or '/'}: {e.get('message')} ({e.get('mend')})" for e in self.errors]
        super().__init__("\n".join(lines))


class JobFailed(Exception):
    """A waited-for job ended, but not with ``succeeded``. ``job`` is its last state."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        error = job.get("error") or {}
        reason = error.get("message") or job.get("status_reason") or "no reason given"
        tail = f"\n{error['log_tail']}" if error.get("log_tail") else ""
        super().__init__(f"job {job.get('id')} {job.get('status')}: {reason}{tail}")
