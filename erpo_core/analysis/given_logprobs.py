"""An entropy analysis of log-probabilities that another engine gave: of the likeliest tokens alone, hence intervals.

Nothing is loaded and nothing scored. Each token gets the least and the greatest entropy that its top log-probabilities
allow, and its trace says ``exact: false``. Pivots are found on the least: what stands out there is certainly uncertain.
"""

from typing import Any

import numpy as np

from erpo_core.analysis.detectors import DETECTOR_VERSION, find_pivots
from erpo_core.analysis.interval import entropy_interval
from erpo_core.analysis.statistics import sequence_stats, top_pivot_tokens
from erpo_core.analysis.tokens import display_parts
from erpo_core.codec import encode_trace
from erpo_core.errors import SpecError
from erpo_core.job import JobInputs, Stop, leave_if_asked, leaves_early
from erpo_core.records import Progress, Resolved, Result, Sink, Trace
from erpo_core.specs.entropy import UNKNOWN_LOGPROB, EntropySpec, GivenLogprobs, GivenToken

_SAME = 1e-3
"""Two log-probabilities this near are those of one token: it comes twice, beside its text and in the list."""


@leaves_early
def run_given_logprobs(spec: EntropySpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Bound the entropies and report; what earlier attempts have stored is not stored again.

    Raises:
        SpecError: log-probabilities that no distribution has, with their place.
    """
    given = spec.logprobs
    intervals = bounded_entropies(given)
    sink.emit(Resolved({"exact": False, "vocab_size": given.vocab_size}))
    lows = [low for low, _ in intervals]
    found = find_pivots(lows, spec.detector)
    stored = {(row["prompt_id"], row["sample"]) for row in inputs.stored_traces}
    pivots = []
    for index, positions in enumerate(found):
        leave_if_asked(stop)
        trace = _trace(spec, index, intervals[index], positions)
        if (trace.meta["prompt_id"], 0) not in stored:
            sink.emit(trace)
        pivots += trace.meta["pivots"]
        sink.emit(Progress("score", index + 1, len(found)))
    summary = {
        "exact": False,
        "num_sequences": len(found),
        "num_tokens": sum(map(len, lows)),
        **{f"entropy_{name}": _stats([pair[side] for pair in intervals]) for side, name in enumerate(("low", "high"))},
        "num_pivots": len(pivots),
        "top_pivot_tokens": top_pivot_tokens(pivots, "max_entropy_low"),
        "detector_version": DETECTOR_VERSION,
    }
    sink.emit(Result(summary))
    return summary


def bounded_entropies(given: GivenLogprobs) -> list[tuple[np.ndarray, np.ndarray]]:
    """The least and the greatest entropy of each token of each text, (tokens,) float64 nats.

    Raises:
        SpecError: log-probabilities that no distribution has, with their place.
    """
    found = []
    for index, one in enumerate(given.texts):
        bounds = np.empty((2, len(one.content)))
        for position, token in enumerate(one.content):
            try:
                bounds[:, position] = _interval(token, given.vocab_size)
            except ValueError as error:
                raise SpecError(
                    f"token {position}: {error}",
                    pointer=f"/logprobs/texts/{index}/content/{position}/top_logprobs",
                    mend="give raw log-probabilities of the likeliest tokens, and the vocabulary's size",
                ) from error
        found.append((bounds[0], bounds[1]))
    return found


def _interval(token: GivenToken, vocab_size: int) -> tuple[float, float]:
    """A token outside the list is known beside it, and does not bound the others: the least of the list does."""
    top = [other.logprob for other in token.top_logprobs]
    least = min(top)
    if token.logprob >= least:
        if min(abs(token.logprob - logprob) for logprob in top) > _SAME:
            raise ValueError(f"its log-probability of {token.logprob:g} is not among the likeliest")
        return entropy_interval(top, vocab_size)
    known = [] if token.logprob <= UNKNOWN_LOGPROB else [token.logprob]
    return entropy_interval([*top, *known], vocab_size, ceiling=least)


def _trace(spec: EntropySpec, index: int, interval: tuple[np.ndarray, np.ndarray], positions: np.ndarray) -> Trace:
    given = spec.logprobs.texts[index]
    parts = [token.utf8 for token in given.content]
    tokens = display_parts(len(parts), lambda start, end: b"".join(parts[start:end]).decode(errors="replace"))
    low, high = (_outward(bound, end) for bound, end in zip(interval, (0.0, np.inf), strict=True))
    unknown = [token.logprob <= UNKNOWN_LOGPROB for token in given.content]
    logps = np.where(unknown, np.nan, [token.logprob for token in given.content])
    columns = {
        "entropy_low": low,
        "entropy_high": high,
        "logp": logps,
        "top_prob": np.exp([max(other.logprob for other in token.top_logprobs) for token in given.content]),
    }
    meta = {
        "prompt_id": f"prompt-{index}",
        "group": index,
        "sample": 0,
        "prompt": given.prompt,
        "completion": "".join(tokens),
        "num_tokens": len(tokens),
        "tokens": tokens,
        "stats": {"h_mean_low": float(low.mean()), "h_mean_high": float(high.mean())},
        "histogram": [],
        "group_stats": {},
        "pivots": [
            {
                "position": int(position),
                "entropy": float(low[position]),
                "logp": None if unknown[position] else float(logps[position]),
                "token": tokens[position],
                "alternatives": _alternatives(given.content[position], spec.top_k_alternatives),
            }
            for position in positions
        ],
        "temperature": spec.temperature,
        "exact": False,
    }
    return Trace(0, meta, encode_trace(columns))


def _outward(bound: np.ndarray, end: float) -> np.ndarray:
    """As float32, which is stored, and not rounded into the interval."""
    stored = bound.astype(np.float32)
    inside = stored > bound if end == 0 else stored < bound
    return np.where(inside, np.nextafter(stored, np.float32(end)), stored)


def _alternatives(token: GivenToken, count: int) -> list[dict[str, Any]]:
    ranked = sorted(token.top_logprobs, key=lambda other: -other.logprob)[:count]
    return [{"token": other.token, "token_id": None, "logp": other.logprob} for other in ranked]


def _stats(columns: list[np.ndarray]) -> dict[str, float | None]:
    stats, _ = sequence_stats(np.concatenate(columns))
    return {name.removeprefix("h_"): value for name, value in stats.items()}
