"""Identifiers: a prefix that tells the kind, and a UUIDv7, whose order is that of creation."""

import secrets
import threading
import time

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """For example ``job_0199...``; later ids of one process are greater, even within a millisecond.

    48 bits of milliseconds, version, 12 bits of the millisecond's fraction (RFC 9562, section 6.2, method 3), variant,
    62 random bits.
    """
    ticks = _next_tick()
    value = ((ticks >> 12) << 80) | (7 << 76) | ((ticks & 0xFFF) << 64) | (2 << 62) | secrets.randbits(62)
    return f"{prefix}_{value:032x}"


def _next_tick() -> int:
    """The time in 1/4096 ms, moved on where the clock stands still or goes back."""
    global _last
    with _lock:
        _last = max(time.time_ns() * 4096 // 1_000_000, _last + 1)
        return _last
