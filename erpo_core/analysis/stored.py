"""Traces that earlier attempts of a job have stored: what a killed analysis goes on from."""

from base64 import b64decode
from dataclasses import dataclass
from typing import Any

import numpy as np

from erpo_core.codec import decode_trace
from erpo_core.job import JobInputs


@dataclass(frozen=True)
class StoredTrace:
    """One answer as it is stored. ``pivots``: ``position``, ``entropy``, ``token`` of each, ascending."""

    token_ids: list[int]
    entropies: np.ndarray
    """(tokens,) float32, nats: the very numbers that were measured."""
    pivots: list[dict[str, Any]]


def stored_traces(inputs: JobInputs) -> dict[tuple[str, int], StoredTrace]:
    """Stored traces by (prompt_id, sample).

    Raises:
        CodecError: a blob is damaged.
    """
    found = {}
    for row in inputs.stored_traces:
        columns = decode_trace(b64decode(row["blob"]), ["token_ids", "entropy"])
        trace = StoredTrace(columns["token_ids"].tolist(), columns["entropy"], row["pivots"])
        found[row["prompt_id"], row["sample"]] = trace
    return found
