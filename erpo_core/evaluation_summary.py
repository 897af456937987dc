"""From stored answers to the numbers of an evaluation; nothing is generated, and another k costs nothing."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from erpo_core.passk import interval, majority, pass_at_k
from erpo_core.rewards.answers import extract_boxed


def summarise(rows: Iterable[dict[str, Any]], pass_at: Sequence[int] = (1,)) -> dict[str, Any]:
    """Acc, Fmt, pass@k, maj@k and lengths with 95% intervals over problems.

    Args:
        rows: Completion rows: ``prompt_id``, ``sample``, ``completion``, ``verdict``, ``boxed``, ``truncated``,
            ``num_tokens``.
        pass_at: k; those above the number of samples are left out.
    """
    problems: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        problems[row["prompt_id"]].append(row)
    groups = [sorted(group, key=lambda row: row["sample"]) for _, group in sorted(problems.items())]
    samples = min(map(len, groups), default=0)
    answers = [row for group in groups for row in group]
    verdicts = Counter(row["verdict"] for row in answers)
    return {
        "acc": _mean_of(groups, is_right),
        "fmt": _mean_of(groups, lambda row: bool(row["boxed"])),
        "mean_length": _mean_of(groups, lambda row: row["num_tokens"]),
        "truncated": _mean_of(groups, lambda row: bool(row["truncated"])),
        "pass_at": {str(k): interval([_pass(group, k) for group in groups]) for k in pass_at if k <= samples},
        "maj_at": {str(samples): interval([_majority_is_right(group) for group in groups])} if samples else {},
        "verdicts": {name: count / len(answers) for name, count in sorted(verdicts.items())},
        "num_problems": len(groups),
        "num_samples": samples,
    }


def is_right(row: dict[str, Any]) -> bool:
    """Whether an answer counts."""
    return row["verdict"] == "right"


def _mean_of(groups: list[list[dict[str, Any]]], value) -> dict[str, float | None]:
    return interval([sum(map(value, group)) / len(group) for group in groups])


def _pass(group: list[dict[str, Any]], k: int) -> float:
    return pass_at_k(len(group), sum(map(is_right, group)), k)


def _majority_is_right(group: list[dict[str, Any]]) -> bool:
    answers = [extract_boxed(row["completion"]) for row in group]
    chosen = majority(answers)
    return chosen is not None and is_right(group[answers.index(chosen)])
