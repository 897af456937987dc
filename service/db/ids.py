"""Identifiers: a prefix that tells the kind, and a UUIDv7, whose order is that of creation."""

import secrets
import time


def new_id(prefix: str) -> str:
    """For example ``job_0199...``: 48 bits of milliseconds, then version, variant and 74 random bits (RFC 9562)."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | (7 << 76) | (secrets.randbits(12) << 64) | (2 << 62) | secrets.randbits(62)
    return f"{prefix}_{value:032x}"
