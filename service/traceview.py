"""Stored token traces as the API's JSON: the same shape for entropy analyses and for traces of training steps."""

from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from erpo_core.analysis.statistics import HISTOGRAM_EDGES
from erpo_core.errors import SpecError
from service.db import traces as trace_rows
from service.shape import finite, numbers

MAX_TOKENS = 65_536


def is_exact(run: Any) -> bool:
    """Are an analysis's entropies exact? Of given top-k log-probabilities they are only known to lie in intervals."""
    return not run.spec.get("logprobs")


def lower_bounds(items: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Items whose ``names`` hold what entropies are at least: called so, and no entropy is given."""
    return [item | dict.fromkeys(names) | {f"{name}_low": item[name] for name in names} for item in items]


def sequence_json(row: Any) -> dict[str, Any]:
    """A sequence without its tokens."""
    return {
        "n": row.n,
        "id": row.id,
        "step": row.step,
        "prompt_id": row.prompt_id,
        "group": row.group,
        "sample": row.sample,
        "prompt": row.prompt,
        "completion": row.completion,
        "num_tokens": row.num_tokens,
        "reward": finite(row.reward),
        "verdict": row.origin.get("verdict"),
        "advantage": finite(row.advantage),
        "stats": finite(row.stats or {}),
        "group_stats": finite(row.group_stats or {}),
        "exact": row.origin.get("exact", True),
    }


def tokens_json(session: Session, row: Any, channels: list[str] | None, start: int, end: int | None) -> dict[str, Any]:
    """Tokens ``start`` to ``end`` with the channels asked for (all, if None).

    Raises:
        SpecError: a channel that this trace does not have.
    """
    start, end = bounds(row, start, end)
    columns = read_columns(session, row, channels, start, end)
    ids = columns.pop("token_ids", None)
    exact = row.origin.get("exact", True)
    pivots = [pivot_json(pivot) for pivot in trace_rows.list_pivots(session, row, start, end)]
    return {
        "n": row.n,
        "start": start,
        "end": end,
        "tokens": list(row.tokens or ())[start:end],
        "token_ids": None if ids is None else ids.tolist(),
        "channels": {name: numbers(column) for name, column in columns.items()},
        "pivots": pivots if exact else lower_bounds(pivots, "entropy"),
        "group_stats": finite(row.group_stats or {}),
        "exact": exact,
    }


def bounds(row: Any, start: int, end: int | None) -> tuple[int, int]:
    """The range, cut to the sequence and to ``MAX_TOKENS``."""
    stop = row.num_tokens if end is None else min(end, row.num_tokens)
    start = min(start, row.num_tokens)
    return start, max(start, min(stop, start + MAX_TOKENS))


def read_columns(session: Session, row: Any, channels: list[str] | None, start: int, end: int) -> dict[str, np.ndarray]:
    """``token_ids``, where they are known, and the channels, of the range; reads only the blocks that hold it."""
    reader = trace_rows.trace_reader(session, row)
    unknown = sorted(set(channels or ()) - set(reader.channels))
    if unknown:
        raise SpecError(
            f"this trace has no channel {', '.join(unknown)}",
            pointer="/query/channels",
            mend=f"choose among {', '.join(reader.channels)}",
        )
    if channels is None:
        return reader.columns(None, start, end)
    ids = [name for name in reader.channels if name == "token_ids"]
    return reader.columns([*ids, *(name for name in channels if name != "token_ids")], start, end)


def pivot_json(row: Any) -> dict[str, Any]:
    """A Critical Decision Pivot; in lists over a run with the sequence it stands in."""
    return {
        "n": row.n,
        "position": row.position,
        "entropy": finite(row.entropy),
        "logp": finite(row.logp),
        "token": row.token,
        "alternatives": finite(row.alternatives or []),
    }


def histogram_json(counts: list[int], num_sequences: int) -> dict[str, Any]:
    """Counts by entropy with the edges of their bins; zeros where nothing was traced."""
    return {
        "counts": counts or [0] * (len(HISTOGRAM_EDGES) - 1),
        "edges": numbers(HISTOGRAM_EDGES),
        "num_sequences": num_sequences,
        "num_tokens": sum(counts),
    }
