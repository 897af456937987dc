"""The registered reward functions, in TRL's signature: completions and columns in, one number each out."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from erpo_core.rewards.answers import extract_boxed
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.common import RewardSpec

RewardFunction = Callable[..., list[float]]


def reward_functions(rewards: Sequence[RewardSpec], verifier: Verifier) -> list[RewardFunction]:
    """One function per spec, named as the spec; the data set's column ``answer`` is the gold.

    Raises:
        ValueError: an argument of a reward is missing or unknown.
    """
    return [_BUILDERS[reward.name](verifier, **reward.args) for reward in rewards]


class Accuracy:
    """1.0 where the last boxed answer equals the gold. ``last_verdicts`` are those of the last call."""

    __name__ = "accuracy"

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self.last_verdicts: list[Verdict] = []

    def __call__(self, completions: list, answer: list[str], **_: Any) -> list[float]:
        pairs = [(gold, completion_text(text)) for gold, text in zip(answer, completions, strict=True)]
        self.last_verdicts = self._verifier.check_many(pairs)
        return [float(verdict is Verdict.RIGHT) for verdict in self.last_verdicts]


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, plain or as chat turns."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _boxed_format(_verifier: Verifier) -> RewardFunction:
    def boxed_format(completions: list, **_: Any) -> list[float]:
        """1.0 where there is a balanced, non-empty box."""
        return [float(extract_boxed(completion_text(text)) is not None) for text in completions]

    return boxed_format


def _length_penalty(_verifier: Verifier, max_tokens: int = 1024) -> RewardFunction:
    def length_penalty(completions: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """0 for an empty answer, falling to -1 at ``max_tokens``."""
        return [-min(1.0, len(ids) / max_tokens) for ids in completion_ids]

    return length_penalty


def _regex(_verifier: Verifier, pattern: str) -> RewardFunction:
    compiled = re.compile(pattern)

    def regex(completions: list, **_: Any) -> list[float]:
        """1.0 where ``pattern`` is found."""
        return [float(compiled.search(completion_text(text)) is not None) for text in completions]

    return regex


_BUILDERS: dict[str, Callable[..., RewardFunction]] = {
    "accuracy": Accuracy,
    "boxed_format": _boxed_format,
    "length_penalty": _length_penalty,
    "regex": _regex,
}
