"""Sampled answers of an analysis as rows: decoded, checked, ready to be stored."""

from collections.abc import Sequence
from typing import Any

from erpo_core.rewards.answers import has_answer
from erpo_core.rewards.verify import Verdict, Verifier


def checked_rows(
    verifier: Verifier,
    tokenizer: Any,
    answers: Sequence[tuple[list[int], bool]],
    *,
    prompt_id: str,
    group: int,
    prompt: str,
    gold: str | None,
) -> list[dict[str, Any]]:
    """One row an answer, in the shape of :class:`erpo_core.records.Completions`.

    Args:
        answers: Token ids of each, and whether it came to its end. One that was cut is not right, whatever it holds.
        gold: Right answer; without one nothing is judged.

    Raises:
        RunError: ``verifier_unavailable``.
    """
    # PostgreSQL's text holds no NUL character.
    texts = [tokenizer.decode(ids, skip_special_tokens=True).replace("\0", "\ufffd") for ids, _ in answers]
    verdicts: Sequence[Verdict | None] = [None] * len(texts)
    if gold:
        verdicts = verifier.check_many([(gold, text) for text in texts])
    rows = []
    for number, ((ids, finished), text, verdict) in enumerate(zip(answers, texts, verdicts, strict=True)):
        right = None if verdict is None else float(verdict is Verdict.RIGHT and finished)
        rows.append(
            {
                "prompt_id": prompt_id,
                "group": group,
                "sample": number,
                "prompt": prompt,
                "completion": text,
                "gold": gold,
                "rewards": {} if right is None else {"accuracy": right},
                "reward": right,
                "advantage": None,
                "verdict": None if verdict is None else str(verdict),
                "boxed": has_answer(text),
                "truncated": not finished,
                "num_tokens": len(ids),
            }
        )
    return rows


def is_right(row: dict[str, Any]) -> bool:
    """Is the answer of a row, fresh or stored, credited?"""
    return row["verdict"] == "right" and not row["truncated"]
