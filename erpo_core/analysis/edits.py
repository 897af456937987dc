"""Which tokens of an answer a perturbation disturbs, and what it puts in their place. Numpy alone.

Everything is drawn from ``numpy.random.Generator``s seeded by what is disturbed: the same request gives the same edits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erpo_core.rewards.answers import boxed_span
from erpo_core.specs.perturbation import Arm, PerturbationSpec, Policy

_DECILES = 10
_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Edit:
    """One place: what stood there, and what is put there (None: nothing, the answer is cut before it)."""

    position: int
    token_id: int
    replacement: int | None
    logp: float | None
    """Log-probability of the replacement where it stands, nats."""


class Vocabulary:
    """Which tokens may replace another: no special tokens, no parts of characters, nothing without a text."""

    def __init__(self, tokenizer) -> None:
        ids = list(range(len(tokenizer)))
        self.texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        self.usable = np.array([bool(t) and _BROKEN not in t and i not in special for i, t in enumerate(self.texts)])
        self._same: dict[str, list[int]] = {}
        for token, text in zip(ids, self.texts, strict=True):
            self._same.setdefault(text, []).append(token)

    def allowed(self, token_id: int, size: int) -> np.ndarray:
        """(size,) bool: what may stand instead of ``token_id``; ids beyond the tokenizer's are padding of the head."""
        found = np.zeros(size, dtype=bool)
        count = min(size, len(self.usable))
        found[:count] = self.usable[:count]
        found[[token for token in self._same[self.texts[token_id]] if token < size]] = False
        return found


def eligible_tokens(texts: Sequence[str], countable: np.ndarray) -> np.ndarray:
    """(tokens,) bool: tokens before the last box, whole characters, not special.

    What comes after the box cannot change the answer any more; in the box it *is* the answer.

    Args:
        texts: Text of each token; together they are the answer (:func:`erpo_core.analysis.tokens.display_tokens`).
        countable: (tokens,) bool, false on special tokens.
    """
    answer = "".join(texts)
    span = boxed_span(answer)
    start = len(answer) if span is None else answer.rfind("\\boxed", 0, span[0])
    ends = np.cumsum([len(text) for text in texts])
    # A character of several tokens stands on its first; its other tokens have no text.
    parts = np.array([text == "" or _BROKEN in text for text in texts])
    parts[:-1] |= np.array([text == "" for text in texts[1:]], dtype=bool)
    return countable & ~parts & (ends <= start)


def choose_positions(
    entropies: np.ndarray, eligible: np.ndarray, spec: PerturbationSpec, seed: Sequence[int]
) -> dict[Arm, list[int]]:
    """Positions of every arm, equally many, ascending. Empty where high and low would share a token.

    ``high`` and ``low`` are the ceil(fraction n) eligible tokens of most and of least entropy, ties broken by chance;
    in mode ``branch_one`` ``num_positions`` of them are drawn. ``random_matched`` takes for each high token another one
    from the same tenth of the answer, or the nearest outside it.
    """
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(eligible)
    size = int(np.ceil(spec.fraction * len(places) - 1e-9))
    if not size or 2 * size > len(places):
        return {arm: [] for arm in spec.arms}
    order = places[np.lexsort((rng.random(len(places)), entropies[places]))]
    count = min(size, spec.num_positions) if spec.mode == "branch_one" else size
    pools = {"high": order[-size:], "low": order[:size], "random": places}
    chosen = {name: rng.choice(pool, count, replace=False) for name, pool in pools.items()}
    chosen["random_matched"] = _matched(chosen["high"], order[:-size], len(entropies), rng)
    chosen["same"] = chosen["high"]
    return {arm: sorted(int(position) for position in chosen[arm]) for arm in spec.arms}


def _matched(high: np.ndarray, others: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    found: list[int] = []
    for position in rng.permutation(high):
        left = np.setdiff1d(others, found)
        same = left[left * _DECILES // length == position * _DECILES // length]
        if not len(same):
            distance = np.abs(left - position)
            same = left[distance == distance.min()]
        found.append(int(rng.choice(same)))
    return np.array(found)


def draw_replacement(
    policy: Policy,
    logps: np.ndarray,
    allowed: np.ndarray,
    rng: np.random.Generator,
    band: tuple[float, float],
) -> int:
    """The token that is put in place of another.

    Args:
        logps: (V,) log-probabilities at the place.
        allowed: (V,) bool, the written token excluded.
        band: Of ``surprisal_matched``, nats; where no allowed token lies in it, the one nearest to it is taken.
    """
    ids = np.flatnonzero(allowed)
    values = logps[ids]
    if policy == "uniform_vocab":
        return int(rng.choice(ids))
    if policy == "second_best":
        return int(ids[values.argmax()])
    if policy == "on_policy_alt":
        weights = np.exp(values - values.max())
        return int(rng.choice(ids, p=weights / weights.sum()))
    low, high = band
    outside = np.maximum(np.maximum(low + values, -values - high), 0)
    return int(rng.choice(ids[outside == outside.min()]))
