"""From sampled answers to the numbers of an evaluation. Light: stored answers give the same numbers again.

A row: ``prompt_id``, ``sample``, ``completion``, ``verdict``, ``boxed``, ``truncated``, ``num_tokens``, and where the
data set has them ``level`` and ``subject``.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from erpo_core.passk import bootstrap_interval, maj_at_k, pass_at_k
from erpo_core.rewards.answers import extract_boxed, normalise, plain_number
from erpo_core.specs.evaluate import EvaluateSpec

Row = dict[str, Any]


def summarise(rows: Iterable[Row], spec: EvaluateSpec) -> dict[str, Any]:
    """``acc``, ``fmt``, ``mean_length``, ``pass_at``, ``maj_at`` with intervals over problems; shares and counts.

    An answer that comes twice counts once. pass@k and maj@k are given for the k of ``spec.pass_at`` that every
    problem has samples for. ``by``: the same by level and by subject, where the problems have them.

    Raises:
        ValueError: no row.
    """
    problems = by_problem(rows)
    every = [row for samples in problems for row in samples]
    if not every:
        raise ValueError("summarise: no answer")
    fewest = min(map(len, problems))
    seed = spec.sampling.seed
    ks = [k for k in sorted(set(spec.pass_at)) if 1 <= k <= fewest]
    maj_at = {k: [maj_at_k(*_votes(p, spec), k, seed=seed) for p in problems] for k in ks}
    lengths = sorted(row["num_tokens"] for row in every)
    verdicts = Counter(str(row["verdict"]) for row in every)
    return {
        **_numbers(problems, spec, ks),
        "median_length": lengths[len(lengths) // 2],
        "truncated": _mean([row["truncated"] for row in every]),
        "maj_at": {str(k): _interval(values, seed) for k, values in maj_at.items()},
        "verdicts": {name: count / len(every) for name, count in sorted(verdicts.items())},
        "by": {field: found for field in ("level", "subject") if (found := _breakdown(problems, field, spec, ks))},
        "num_samples": fewest,
        "num_answers": len(every),
    }


def by_problem(rows: Iterable[Row]) -> list[list[Row]]:
    """The answers of each problem, in the order of their samples; problems in the order of their ids."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], {})[row["sample"]] = row
    return [[samples[i] for i in sorted(samples)] for _, samples in sorted(found.items())]


def num_right(samples: Sequence[Row], spec: EvaluateSpec) -> int:
    """How many answers to one problem are credited."""
    return sum(is_right(row, spec) for row in samples)


def _numbers(problems: Sequence[Sequence[Row]], spec: EvaluateSpec, ks: Sequence[int]) -> dict[str, Any]:
    seed = spec.sampling.seed
    right = [num_right(p, spec) for p in problems]
    pass_at = {k: [pass_at_k(len(p), c, k) for p, c in zip(problems, right, strict=True)] for k in ks}
    return {
        "acc": _interval([c / len(p) for p, c in zip(problems, right, strict=True)], seed),
        "fmt": _interval([_mean([row["boxed"] for row in p]) for p in problems], seed),
        "mean_length": _interval([_mean([row["num_tokens"] for row in p]) for p in problems], seed),
        "pass_at": {str(k): _interval(values, seed) for k, values in pass_at.items()},
        "num_problems": len(problems),
    }


def _breakdown(
    problems: Sequence[Sequence[Row]], field: str, spec: EvaluateSpec, ks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Numbers of each group of problems; those without a label are left out."""
    groups: dict[str, list[Sequence[Row]]] = {}
    for samples in problems:
        label = samples[0].get(field)
        if label is not None:
            groups.setdefault(str(label), []).append(samples)
    return {label: _numbers(groups[label], spec, ks) for label in sorted(groups)}


def is_right(row: Row, spec: EvaluateSpec) -> bool:
    """Is the answer credited? The verdict says what stood in the box, the specification whether a cut answer counts."""
    return row["verdict"] == "right" and not (row["truncated"] and spec.truncated_boxed == "wrong")


def _votes(samples: Sequence[Row], spec: EvaluateSpec) -> tuple[list[Any], list[bool]]:
    """Right answers vote together, whatever they are written like; others by their tidied text or number."""
    right = [is_right(row, spec) for row in samples]
    votes = [("right",) if good else _vote(row) for row, good in zip(samples, right, strict=True)]
    return votes, right


def _vote(row: Row) -> Any:
    text = normalise(extract_boxed(row["completion"]) or "")
    number = plain_number(text)
    return text or None if number is None else number


def _interval(values: Sequence[float], seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, seed=seed)
    return {"value": _mean(values), "low": low, "high": high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
