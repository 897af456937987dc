"""From the outcomes of a perturbation to its numbers: effects with intervals first, tests after them. Numpy alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from erpo_core.analysis.checked import is_right
from erpo_core.paired import holm, mcnemar_exact, minimum_detectable, paired_difference, sign_flip_test
from erpo_core.passk import bootstrap_interval
from erpo_core.specs.perturbation import PerturbationSpec

Row = dict[str, Any]
CONTRASTS = (("low", "high"), ("random_matched", "high"), ("random", "high"), ("same", "high"), ("same", "low"))
"""Accuracy of the first minus that of the second. The first two were meant to be looked at before any result."""
_NUM_PRIMARY = 2
_RESAMPLES = 10_000
_NUM_EXAMPLES = 30


def summarise(rows: Sequence[Row], facts: Sequence[Row], spec: PerturbationSpec) -> dict[str, Any]:
    """``arms`` and ``contrasts``, over the problems that have outcomes in every arm.

    Args:
        rows: Outcomes: ``prompt_id`` (``group/arm/...``), ``verdict``, ``truncated``.
        facts: Per problem and arm ``group``, ``arm`` and ``edits``, each with ``position``, ``progress``, ``entropy``,
            ``token``, ``replacement``, ``surprisal``.

    A continuation that was cut at the length limit counts as wrong and is counted as ``truncated`` as well.
    """
    outcomes: dict[str, dict[int, list[bool]]] = {arm: {} for arm in spec.arms}
    by_arm: dict[str, list[Row]] = {arm: [] for arm in spec.arms}
    for row in rows:
        group, arm = row["prompt_id"].split("/")[:2]
        outcomes[arm].setdefault(int(group), []).append(is_right(row))
        by_arm[arm].append(row)
    groups = sorted(set.intersection(*(set(found) for found in outcomes.values())))
    accuracy = {arm: np.array([np.mean(found[g]) for g in groups]) for arm, found in outcomes.items()}
    single = all(len(found[g]) == 1 for found in outcomes.values() for g in groups)
    return {
        "num_problems": len(groups),
        "num_outcomes": len(rows),
        "mode": spec.mode,
        "policy": spec.policy,
        "arms": {arm: _arm(by_arm[arm], accuracy[arm], _edits(facts, arm), spec) for arm in spec.arms},
        "contrasts": _contrasts(accuracy, single, spec.sampling.seed),
        "examples": _examples(facts, outcomes),
    }


def _arm(rows: Sequence[Row], accuracy: np.ndarray, edits: Sequence[dict], spec: PerturbationSpec) -> dict:
    low, high = bootstrap_interval(accuracy, resamples=_RESAMPLES, seed=spec.sampling.seed)
    return {
        "accuracy": {"value": float(accuracy.mean()), "low": low, "high": high},
        "num_outcomes": len(rows),
        "truncated": _mean([row["truncated"] for row in rows]),
        "unparsable": _mean([row["verdict"] == "unparsable" for row in rows]),
        "mean_entropy": _mean([edit["entropy"] for edit in edits]),
        "mean_progress": _mean([edit["progress"] for edit in edits]),
        "mean_surprisal": _mean([edit["surprisal"] for edit in edits if edit["surprisal"] is not None]),
    }


def _contrasts(accuracy: dict[str, np.ndarray], single: bool, seed: int) -> list[Row]:
    found = []
    for index, (first, second) in enumerate(CONTRASTS):
        if first in accuracy and second in accuracy:
            contrast = _contrast(accuracy[first], accuracy[second], single, seed)
            found.append({"first": first, "second": second, "primary": index < _NUM_PRIMARY, **contrast})
    adjusted = holm([contrast["p_value"] for contrast in found])
    return [contrast | {"p_holm": p_value} for contrast, p_value in zip(found, adjusted, strict=True)]


def _contrast(first: np.ndarray, second: np.ndarray, single: bool, seed: int) -> dict[str, Any]:
    difference = paired_difference(second, first, resamples=_RESAMPLES, seed=seed)
    contrast = {
        "difference": difference["value"],
        "low": difference["low"],
        "high": difference["high"],
        "minimum_detectable": minimum_detectable(first - second),
    }
    if single:
        a, b = first > 0.5, second > 0.5
        table = [[int((x & y).sum()) for y in (b, ~b)] for x in (a, ~a)]
        return contrast | {"test": "mcnemar_exact", "p_value": mcnemar_exact(table[0][1], table[1][0]), "table": table}
    return contrast | {"test": "sign_flip", "p_value": sign_flip_test(first - second, resamples=_RESAMPLES, seed=seed)}


def _examples(facts: Sequence[Row], outcomes: dict[str, dict[int, list[bool]]]) -> list[Row]:
    """Some edits with what became of them, the first problems of every arm."""
    found = []
    for fact in facts[:_NUM_EXAMPLES]:
        results = outcomes[fact["arm"]].get(fact["group"], [])
        found.append(fact | {"edits": fact["edits"][:4], "right": sum(results), "num_outcomes": len(results)})
    return found


def _edits(facts: Sequence[Row], arm: str) -> list[Row]:
    return [edit for fact in facts if fact["arm"] == arm for edit in fact["edits"]]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
