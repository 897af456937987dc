"""Evaluations of several models, benchmark by benchmark, against the first that was named."""

from typing import Any

from sqlalchemy.orm import Session

from erpo_core.errors import SpecError
from erpo_core.evaluation_identity import differing_parts, model_of
from erpo_core.paired import holm, mcnemar_exact, paired_difference, sign_flip_exact
from erpo_core.passk import pass_at_k
from service.db.problems import ProblemCounts, count_problems
from service.evaluationview import Finished

_MEND = "evaluate both with the same request; only the model and the seed may differ"


def comparison_json(session: Session, evaluations: list[Finished]) -> dict[str, Any]:
    """Per benchmark: differences to its first evaluation, their intervals, tests, and p-values corrected over all.

    Raises:
        SpecError: a benchmark has only one evaluation, or two that differ in more than the model.
    """
    groups: dict[Any, list[Finished]] = {}
    for one in evaluations:
        groups.setdefault(one.parts.get("dataset"), []).append(one)
    _check_groups(groups)
    found = [_benchmark(session, group) for group in groups.values()]
    tests = [row for benchmark in found for row in benchmark["comparisons"]]
    for row, adjusted in zip(tests, holm([row["p_value"] for row in tests]), strict=True):
        row["p_adjusted"] = adjusted
    return {"benchmarks": found, "num_tests": len(tests), "correction": "holm"}


def _check_groups(groups: dict[Any, list[Finished]]) -> None:
    alone = [group[0] for group in groups.values() if len(group) == 1]
    first = next(iter(groups.values()))[0]
    if alone and len(groups) == 2 and sum(map(len, groups.values())) == 2:
        _refuse(first, next(one for one in alone if one is not first), ["dataset"])
    if alone:
        one = alone[0]
        raise SpecError(
            f"nothing to compare {one.run_id} with: it is the only one on {one.benchmark}",
            pointer="/query/evaluation",
            mend="name at least two evaluations of the same problems",
        )
    for baseline, *others in groups.values():
        for other in others:
            names = differing_parts(baseline.parts, other.parts)
            if names:
                _refuse(baseline, other, names)


def _refuse(first: Finished, second: Finished, names: list[str]) -> None:
    both = "; ".join(f"{name}: {_short(first.parts.get(name))} and {_short(second.parts.get(name))}" for name in names)
    raise SpecError(
        f"{first.run_id} and {second.run_id} differ in {', '.join(names)} ({both})",
        pointer="/query/evaluation",
        mend=_MEND,
        code="evaluations_differ",
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _benchmark(session: Session, group: list[Finished]) -> dict[str, Any]:
    counts = {one.run_id: _counts(session, one) for one in group}
    baseline, *others = group
    return {
        "benchmark": baseline.benchmark,
        "num_problems": len(counts[baseline.run_id]),
        "num_samples": baseline.spec.num_samples,
        "baseline": baseline.run_id,
        "evaluations": [_evaluation(one) for one in group],
        "comparisons": [_compared(baseline, other, counts) for other in others],
    }


def _counts(session: Session, one: Finished) -> list[ProblemCounts]:
    return count_problems(session, one.run_id, truncated_boxed=one.spec.truncated_boxed)


def _evaluation(one: Finished) -> dict[str, Any]:
    names = ("acc", "fmt", "mean_length", "pass_at", "truncated")
    return {
        "id": one.run_id,
        "model": one.label,
        "weights": model_of(one.parts),
        "seed": one.parts.get("seed"),
        **{name: one.result[name] for name in names},
    }


def _compared(baseline: Finished, other: Finished, counts: dict[str, list[ProblemCounts]]) -> dict[str, Any]:
    first, second = counts[baseline.run_id], counts[other.run_id]
    if [p.prompt_id for p in first] != [p.prompt_id for p in second]:
        _refuse(baseline, other, ["problems"])
    seed = baseline.spec.sampling.seed
    gains = [b.num_right - a.num_right for a, b in zip(first, second, strict=True)]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    is_single = baseline.spec.num_samples == 1
    ks = sorted({int(k) for k in baseline.result["pass_at"]} & {int(k) for k in other.result["pass_at"]})

    def difference(value: Any) -> dict[str, float]:
        return paired_difference([value(p) for p in first], [value(p) for p in second], seed=seed)

    return {
        "evaluation": other.run_id,
        "baseline": baseline.run_id,
        "acc": difference(lambda p: p.num_right / p.num_samples),
        "fmt": difference(lambda p: p.num_boxed / p.num_samples),
        "mean_length": difference(lambda p: p.num_tokens / p.num_samples),
        "pass_at": {str(k): difference(lambda p, k=k: pass_at_k(p.num_samples, p.num_right, k)) for k in ks},
        "problems": {"better": better, "worse": worse, "equal": len(gains) - better - worse},
        "test": "mcnemar_exact" if is_single else "sign_flip_exact",
        "p_value": mcnemar_exact(worse, better) if is_single else sign_flip_exact(gains),
    }
