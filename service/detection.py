"""Critical Decision Pivots found anew from stored entropies, with any detector; and which words pivots are."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, Query
from sqlalchemy.orm import Session

from erpo_core.analysis.detectors import find_pivots
from erpo_core.errors import SpecError
from erpo_core.specs.entropy import DetectorSpec
from service.db import traces as trace_rows
from service.shape import finite

MAX_TOKENS = 2_000_000
"""What one request looks at: a second or two."""
_PAGE = 200


def _detector(
    detector: Annotated[
        Literal["quantile", "absolute", "zscore", "gate", "transient"] | None,
        Query(description="Find pivots anew from the stored entropies; without it, those that were stored."),
    ] = None,
    scope: Annotated[Literal["sequence", "group", "run"], Query()] = "sequence",
    fraction: Annotated[float, Query(gt=0, le=1, description="`quantile`: share of tokens.")] = 0.05,
    threshold: Annotated[
        float | None, Query(allow_inf_nan=False, description="Nats, sigmas, W or prominence, by detector.")
    ] = None,
    min_entropy: Annotated[float, Query(ge=0, allow_inf_nan=False, description="Nats.")] = 0.0,
) -> DetectorSpec | None:
    if detector is None:
        return None
    return DetectorSpec(kind=detector, scope=scope, fraction=fraction, threshold=threshold, min_entropy=min_entropy)


Detector = Annotated[DetectorSpec | None, Depends(_detector)]


def detected(session: Session, run: Any, detector: DetectorSpec) -> Iterator[dict[str, Any]]:
    """Pivots of the whole run, sequence by sequence, in the API's shape; alternatives are stored at others, if at all.

    Raises:
        SpecError: the run has too many tokens to look at in one request.
    """
    entropies, rows = [], []
    total = 0
    for row in _sequences(session, run.id):
        total += row["num_tokens"]
        if total > MAX_TOKENS:
            raise SpecError(
                f"the analysis has more than {MAX_TOKENS} tokens",
                pointer="/query/detector",
                mend="export it (format=npz) and run erpo_core.analysis.detectors.find_pivots on the entropies",
            )
        entropies.append(row.pop("entropies"))
        rows.append(row)
    # The seeds are those of the analysis: the same detector finds the same tokens, ties included.
    found = find_pivots(entropies, detector, [row["group"] for row in rows])
    for row, values, positions in zip(rows, entropies, found, strict=True):
        tokens = trace_rows.token_texts(session, run.id, row["n"]) if len(positions) else []
        for position in positions.tolist():
            entropy = float(values[position])
            pivot = {"n": row["n"], "position": position, "entropy": entropy, "logp": None, "token": tokens[position]}
            yield pivot | {"alternatives": [], "num_tokens": row["num_tokens"]}


def _sequences(session: Session, run_id: str) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        page = trace_rows.list_sequences(session, run_id, cursor=cursor, limit=_PAGE)
        for row in page.rows:
            reader = trace_rows.trace_reader(session, row)
            channel = trace_rows.entropy_channel(reader)
            values = reader.columns([channel])[channel].astype(np.float64)
            values[row.origin.get("special_positions") or []] = np.nan
            yield {"n": row.n, "group": row.group, "num_tokens": row.num_tokens, "entropies": values}
        if (cursor := page.next_cursor) is None:
            return


def stored(session: Session, run: Any) -> Iterator[dict[str, Any]]:
    """The pivots that were stored, with the lengths of their sequences."""
    for pivot, num_tokens in trace_rows.all_pivots(session, run.id):
        names = ("n", "position", "entropy", "token")
        yield {name: getattr(pivot, name) for name in names} | {"num_tokens": num_tokens}


def word_statistics(pivots: Iterator[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """Which tokens pivots are, most frequent first: how often, how uncertain, and where in their answers."""
    by_word: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for pivot in pivots:
        by_word[pivot["token"]].append((pivot["entropy"], pivot["position"] / max(1, pivot["num_tokens"])))
    ranked = sorted(by_word.items(), key=lambda item: (-len(item[1]), item[0]))[:top]
    total = sum(map(len, by_word.values()))
    words = []
    for word, facts in ranked:
        entropy, progress = np.mean(facts, axis=0)
        highest = max(entropy for entropy, _ in facts)
        words.append(
            {
                "token": word,
                "count": len(facts),
                "share": len(facts) / total,
                "mean_entropy": float(entropy),
                "max_entropy": highest,
                "mean_progress": float(progress),
            }
        )
    return finite(words)
