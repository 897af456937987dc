"""What travels through a training step."""

from dataclasses import dataclass
from typing import Any

from numpy import ndarray
from torch import Tensor

from erpo_core.advantages import ERPOSignals
from erpo_core.generation.base import Sample
from erpo_core.trainer.scoring import Rollouts


@dataclass(frozen=True)
class Answer:
    """One sampled answer and how it was judged."""

    example: dict[str, Any]
    """The data set's row."""
    prompt_ids: list[int]
    sample: Sample
    completion: str | list[dict[str, str]]
    rewards: list[float]
    """One for each reward function; NaN where it did not judge."""
    verdict: str | None
    extra: dict[str, Any]
    """What reward functions gave to ``log_extra`` for it."""


@dataclass(frozen=True)
class Scored:
    """Policy and reference on the sampled tokens, (B, T), and the advantages that follow."""

    logps: Tensor
    ref_logps: Tensor
    entropies: Tensor
    leverage_norms: Tensor | None
    """Of the forward that is differentiated; None before it."""
    kls: Tensor | None
    """KL(policy || reference) over the whole vocabulary; None where the reference was not scored with this policy."""
    signals: ERPOSignals
    advantages: Tensor
    gate_stats: tuple[float, float] | None
    """Mean and standard deviation of the entropy that the gates took in place of their group's."""


@dataclass
class MicroBatch:
    """Responses of one micro-batch. ``old`` is set where the advantages were formed before the loss.

    ``rollouts.mask`` leaves out the answers that no reward function judged; ``lengths`` counts their tokens as well.
    """

    rollouts: Rollouts
    weights: Tensor
    """(B,) float32: each token's share of the loss of the optimizer step, all ranks together."""
    rewards: Tensor
    outcomes: Tensor
    finished: Tensor
    engine_logps: Tensor
    """(B, T) log-probabilities of the sampled tokens by the engine that sampled them; NaN where it gave none."""
    lengths: list[int]
    examples: list[dict[str, Any]]
    completions: list[str]
    reward_rows: dict[str, Tensor]
    first_row: int
    """Of its first response among those of the generation."""
    old: Scored | None = None
    last_scored: Scored | None = None
    verdicts: list[str] | None = None
    extras: list[dict[str, Any]] | None = None
    """:attr:`Answer.extra` of each."""


@dataclass(frozen=True)
class TracedAnswer:
    """What is kept of one response of a group that is traced."""

    example: dict[str, Any]
    completion: str
    reward: float
    verdict: str | None
    advantage: float
    """A_i."""
    channels: dict[str, ndarray]
    """{name: (tokens,)} of its active tokens."""


@dataclass(frozen=True)
class TraceGroup:
    """A whole group that is traced, whatever ranks and micro-batches its responses lie on."""

    number: int
    """Among those of the generation."""
    answers: list[TracedAnswer]
    noise_floor: float
    gate_stats: tuple[float, float] | None
    """See :class:`Scored`."""
    step: int
