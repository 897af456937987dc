"""The answers of an evaluation: checked, stored and counted as they come."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from erpo_core.data.formats import Problem
from erpo_core.evaluation_summary import is_right
from erpo_core.generation.base import Sample
from erpo_core.records import Completions, Progress, Sink
from erpo_core.rewards.answers import has_answer
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.evaluate import EvaluateSpec


@dataclass(frozen=True)
class Answer:
    """A sampled answer. ``group`` is the problem's place in the data set, ``number`` the sample's of the problem."""

    problem: Problem
    group: int
    number: int
    sample: Sample


class AnswerBook:
    """Every row of an evaluation, those of earlier attempts included. One thread adds, others may look."""

    def __init__(
        self,
        spec: EvaluateSpec,
        stored_rows: Iterable[dict[str, Any]],
        total: int,
        tokenizer: Any,
        verifier: Verifier,
        sink: Sink,
    ) -> None:
        self._spec, self._tokenizer, self._verifier, self._sink = spec, tokenizer, verifier, sink
        self.rows = [dict(row) for row in stored_rows]
        self._stored = frozenset((row["prompt_id"], row["sample"]) for row in self.rows)
        self._total = total
        self._right = sum(is_right(row, spec) for row in self.rows)
        self._fresh = self._tokens = 0
        self._started = time.monotonic()

    def has_all(self, keys: Iterable[tuple[str, int]]) -> bool:
        """Whether earlier attempts have stored all of these (prompt_id, sample)."""
        return self._stored.issuperset(keys)

    def add(self, answers: Sequence[Answer]) -> None:
        """Check what is not stored yet, send it off, and report how far it is.

        Raises:
            RunError: ``verifier_unavailable``.
        """
        fresh = [answer for answer in answers if (answer.problem.id, answer.number) not in self._stored]
        rows = judged(fresh, self._spec, self._tokenizer, self._verifier)
        self._sink.emit(Completions(0, rows))
        self.rows += rows
        self._fresh += len(rows)
        self._right += sum(row["reward"] == 1.0 for row in rows)
        self._tokens += sum(row["num_tokens"] for row in rows)
        done = len(self._stored) + self._fresh
        self._sink.emit(Progress("generate", done, self._total, self._speed(done)))

    def _speed(self, done: int) -> dict[str, float]:
        acc = self._right / max(done, 1)
        seconds = max(time.monotonic() - self._started, 1e-9)
        return {
            "acc": acc,
            "reward": acc,
            "tokens_per_second": self._tokens / seconds,
            "eta_seconds": (self._total - done) * seconds / max(self._fresh, 1),
        }


def judged(answers: Sequence[Answer], spec: EvaluateSpec, tokenizer: Any, verifier: Verifier) -> list[dict[str, Any]]:
    """A row of :class:`erpo_core.records.Completions` for each answer, with its verdict.

    Raises:
        RunError: ``verifier_unavailable``.
    """
    texts = [_text(tokenizer, answer.sample) for answer in answers]
    golds = [answer.problem.answer for answer in answers]
    verdicts = verifier.check_many(list(zip(golds, texts, strict=True)))
    return [_row(*parts, spec) for parts in zip(answers, texts, verdicts, strict=True)]


def _text(tokenizer: Any, sample: Sample) -> str:
    # PostgreSQL's text holds no NUL character.
    return tokenizer.decode(sample.token_ids, skip_special_tokens=True).replace("\0", "\ufffd")


def _row(answer: Answer, text: str, verdict: Verdict, spec: EvaluateSpec) -> dict[str, Any]:
    row = {
        "prompt_id": answer.problem.id,
        "group": answer.group,
        "sample": answer.number,
        "prompt": answer.problem.problem,
        "completion": text,
        "gold": answer.problem.answer,
        "level": None if answer.problem.level is None else str(answer.problem.level)[:40],
        "subject": answer.problem.subject and answer.problem.subject[:200],
        "advantage": None,
        "verdict": str(verdict),
        "boxed": has_answer(text),
        "truncated": not answer.sample.finished,
        "num_tokens": len(answer.sample.token_ids),
    }
    right = float(is_right(row, spec))
    return {**row, "reward": right, "rewards": {"accuracy": right, "boxed_format": float(row["boxed"])}}
