"""What top-k log-probabilities say of an entropy: an interval that certainly holds it. Numpy alone."""

import math
from collections.abc import Sequence

import numpy as np

_SLACK = 1e-3
"""Log-probabilities come rounded: so much may their sum exceed 1, or the rest what it has room for."""


def entropy_interval(logps: Sequence[float], vocab_size: int, *, ceiling: float | None = None) -> tuple[float, float]:
    """The least and the greatest entropy, in nats, of a distribution of which some probabilities are known.

    Known are p_i of k tokens; the other n = V - k share the mass r = 1 - sum p_i, and none of them has more than c.
    With h = -sum p_i log p_i the entropy is H = h + T, T(q) = -sum q_j log q_j, where the tail q lies in the polytope
    {sum q_j = r, 0 <= q_j <= c}. T is concave and symmetric in q. So it is

    - greatest where q is uniform, q_j = r / n (which is in the polytope, for r <= n c): T = -r log(r / n);
    - least at a vertex, where every q_j but one is 0 or c: floor(r / c) = m tokens have c and one has s = r - m c:
      T = -m c log c - s log s.

    Both are attained, so no narrower interval is certain. It holds H up to the rounding of the given numbers.

    Args:
        logps: Log-probabilities of distinct tokens, nats, under the whole distribution (not renormalised).
        vocab_size: V, tokens of the vocabulary.
        ceiling: log c: no token beyond those given is likelier. The least of ``logps`` where they are the k likeliest.

    Raises:
        ValueError: no such distribution exists: more tokens than the vocabulary has, probabilities of more than 1
            together, or more mass left than n tokens of at most c can hold.
    """
    known = np.exp(np.minimum(np.asarray(logps, dtype=np.float64), 0.0))
    others = vocab_size - len(known)
    if not len(known) or others < 0:
        raise ValueError(f"{len(known)} tokens of a vocabulary of {vocab_size}")
    most = known.min() if ceiling is None else math.exp(min(ceiling, 0.0))
    rest, room = 1.0 - known.sum(), others * most
    if rest < -_SLACK:
        raise ValueError(f"the probabilities add up to {known.sum():.4f}")
    if rest > room + _SLACK:
        raise ValueError(
            f"a probability of {rest:.4f} is left for {others} tokens of at most {most:.2g} each: these are not the "
            "likeliest tokens"
        )
    rest = min(max(rest, 0.0), room)
    entropy = _surprise(known).sum()
    full = math.floor(rest / most) if rest else 0
    low = full * _surprise(most) + _surprise(max(rest - full * most, 0.0))
    high = others * _surprise(rest / others) if rest else 0.0
    return float(entropy + low), float(entropy + max(low, high))


def _surprise(p):
    """-p log p, 0 at 0."""
    return -p * np.log(np.where(np.asarray(p) > 0, p, 1.0))
