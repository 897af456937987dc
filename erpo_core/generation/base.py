"""What an engine is: prompts as token ids in, sampled answers out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from erpo_core.job import Stop, leave_if_asked


@dataclass(frozen=True)
class Sample:
    """One answer. ``token_ids`` include the stop token if there is one; ``finished`` is False at the length limit.

    ``logps``, one a token, are the engine's own log-probabilities of the tokens at the sampling temperature; None where
    the engine was not asked, or top-p or top-k cut the distribution that they would belong to.
    """

    token_ids: list[int]
    finished: bool
    logps: list[float] | None = None


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. ``temperature`` 0 is greedy, ``top_k`` 0 keeps the whole vocabulary."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every token of the vocabulary may be drawn."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


Watch = Callable[[int, int], None]
"""Told now and then while answers grow: how many tokens were sampled, and answers ended, since it was told last.

What it raises ends the call, and its answers are given up."""


def watch_and_leave(stop: Stop, watch: Watch | None = None) -> Watch:
    """A watch that raises LeftEarlyError once the job is asked to leave, and tells ``watch`` until then."""

    def told(tokens: int, ended: int) -> None:
        leave_if_asked(stop)
        if watch is not None:
            watch(tokens, ended)

    return told


class Engine(Protocol):
    """Samples answers from one model."""

    watch: Watch | None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int = 0,
    ) -> list[list[Sample]]:
        """``n`` answers to each prompt; a call with the same arguments gives the same answers.

        An answer ends with a token of ``stop_ids``, and with no other, or after ``max_new_tokens`` tokens.

        Raises:
            ValueError: an empty prompt, or a bound below 1.
        """
        ...

    def generate_each(self, calls: Iterable[Mapping[str, Any]]) -> Iterator[list[list[Sample]]]:
        """What :meth:`generate` gives for the arguments of each call, all of them named, in order.

        An engine may ask for later calls before it gives the answers of an earlier one, to keep its batch full.
        """
        ...


def check_call(prompts: Sequence[Sequence[int]], n: int, max_new_tokens: int) -> None:
    """Raises ValueError for a call that no engine can serve."""
    if min(map(len, prompts), default=1) < 1 or n < 1 or max_new_tokens < 1:
        raise ValueError("generate: prompts must hold a token, n and max_new_tokens must be 1 or more")
