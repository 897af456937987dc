"""The one state machine of a job.

queued ─▶ starting ─▶ running ─▶ succeeded
  ▲          │           ├─▶ pausing ─▶ paused ─▶ queued (resume)
  │          │           ├─▶ cancelling ─▶ cancelled ─▶ queued (retry)
  └──────────┴───────────┴─▶ failed ─▶ queued (retry)
"""

from erpo_core.errors import ConflictError

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE = frozenset({"starting", "running", "pausing", "cancelling"})
"""An attempt owns the job."""

_ENDS = {"succeeded", "failed", "cancelled", "paused", "queued"}
_LEGAL: dict[str, set[str]] = {
    "queued": {"starting", "paused", "cancelled"},
    "starting": {"running", "pausing", "cancelling"} | _ENDS,
    "running": {"pausing", "cancelling"} | _ENDS,
    "pausing": {"cancelling"} | _ENDS,
    "cancelling": _ENDS,
    "paused": {"queued", "cancelled"},
    "failed": {"queued"},
    "cancelled": {"queued"},
    "succeeded": set(),
}
STATUSES = tuple(_LEGAL)


def is_terminal(status: str) -> bool:
    """True for ``succeeded``, ``failed`` and ``cancelled``."""
    return status in TERMINAL


def check_transition(status: str, target: str) -> None:
    """Raises ConflictError (``illegal_transition``) where a job in ``status`` may not become ``target``."""
    if target not in _LEGAL[status]:
        allowed = ", ".join(sorted(_LEGAL[status])) or "nothing"
        raise ConflictError(f"a job that is {status} cannot become {target}; it may become: {allowed}", state=status)
