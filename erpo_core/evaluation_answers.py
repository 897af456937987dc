"""The answers of an evaluation: checked, stored and counted as they come."""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from erpo_core.data.formats import Problem
from erpo_core.evaluation_summary import is_right
from erpo_core.generation.base import Sample
from erpo_core.job import JobInputs
from erpo_core.records import Completions, Progress, Sink
from erpo_core.rewards.answers import has_answer
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.evaluate import EvaluateSpec

_TELL_SECONDS = 5.0


@dataclass(frozen=True)
class Answer:
    """A sampled answer. ``group`` is the problem's place in the data set, ``number`` the sample's of the problem."""

    problem: Problem
    group: int
    number: int
    sample: Sample


class AnswerBook:
    """Every row of a run of an evaluation, those of earlier attempts included. One thread adds, another may watch.

    Args:
        before: answers of the job's runs before this one.
        total: answers of all of its runs.
    """

    def __init__(
        self,
        spec: EvaluateSpec,
        run: JobInputs,
        tokenizer: Any,
        verifier: Verifier,
        sink: Sink,
        *,
        before: int,
        total: int,
    ) -> None:
        self._spec, self._tokenizer, self._verifier, self._sink = spec, tokenizer, verifier, sink
        self._run_id = run.run_id
        self.rows = [dict(row) for row in run.stored_rows]
        self._stored = run.stored
        self._before, self._total = before, total
        self._right = sum(is_right(row, spec) for row in self.rows)
        self._fresh = self._tokens = 0
        self._open_answers = self._open_tokens = 0
        """Sampled, not added yet."""
        self._started = self._told = time.monotonic()
        self._lock = threading.Lock()

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
        with self._lock:
            self._sink.emit(Completions(0, rows, self._run_id))
            self.rows += rows
            self._fresh += len(rows)
            self._right += sum(row["reward"] == 1.0 for row in rows)
            self._tokens += sum(row["num_tokens"] for row in rows)
            self._open_answers = max(0, self._open_answers - len(answers))
            self._open_tokens = max(0, self._open_tokens - sum(len(answer.sample.token_ids) for answer in answers))
            self._tell()

    def watch(self, tokens: int, ended: int) -> None:
        """An engine's :data:`~erpo_core.generation.base.Watch`: tell how far the answers are that are not added yet."""
        with self._lock:
            self._open_tokens += tokens
            self._open_answers += ended
            if time.monotonic() - self._told > _TELL_SECONDS:
                self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        done = min(self._before + len(self.rows) + self._open_answers, self._total)
        sampled = self._fresh + self._open_answers
        seconds = max(self._told - self._started, 1e-9)
        told = {
            "run_id": self._run_id,
            "acc": self._right / len(self.rows) if self.rows else None,
            "tokens_per_second": (self._tokens + self._open_tokens) / seconds,
            "eta_seconds": (self._total - done) * seconds / sampled if sampled else None,
        }
        self._sink.emit(Progress("generate", done, self._total, told))


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
    return credited(row, spec)


def credited(row: dict[str, Any], spec: EvaluateSpec) -> dict[str, Any]:
    """The row with the rewards that its verdict is worth."""
    right = float(is_right(row, spec))
    return {**row, "reward": right, "rewards": {"accuracy": right, "boxed_format": float(row["boxed"])}}
