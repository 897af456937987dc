"""Token traces of training steps: what the credit microscope shows."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from erpo_core.analysis.detectors import find_pivots
from erpo_core.analysis.statistics import sequence_stats
from erpo_core.analysis.tokens import display_tokens
from erpo_core.codec import encode_trace
from erpo_core.records import Trace
from erpo_core.specs.entropy import DetectorSpec
from erpo_core.trainer.batches import MicroBatch, Scored, TracedAnswer, TraceGroup

if TYPE_CHECKING:
    from erpo_core.trainer.trainer import ERPOTrainer


def traced_answers(batch: MicroBatch, scored: Scored, count: int) -> list[TracedAnswer]:
    """The first ``count`` responses of a micro-batch, or as many as it has."""
    return [
        TracedAnswer(
            example=batch.examples[row],
            completion=batch.completions[row],
            reward=float(batch.rewards[row]),
            verdict=batch.verdicts[row] if batch.verdicts else None,
            advantage=float(scored.signals.group_advantages[row]),
            channels=_channels(batch, scored, row),
        )
        for row in range(min(count, len(batch.examples)))
    ]


def trace_records(group: TraceGroup, trainer: "ERPOTrainer", origin: dict[str, Any]) -> Iterator[Trace]:
    """One record per response."""
    group_stats = _group_stats(group)
    pivots = find_pivots([answer.channels["entropy"] for answer in group.answers], DetectorSpec())
    for sample, (answer, positions) in enumerate(zip(group.answers, pivots, strict=True)):
        channels, example = answer.channels, answer.example
        tokens = display_tokens(trainer.processing_class, channels["token_ids"].tolist())
        stats, histogram = sequence_stats(channels["entropy"])
        meta = {
            "prompt_id": str(example.get("prompt_id", f"group-{group.number}")),
            "group": group.number,
            "sample": sample,
            "prompt": example.get("problem") or str(example["prompt"]),
            "completion": answer.completion,
            "num_tokens": len(tokens),
            "reward": answer.reward,
            "verdict": answer.verdict,
            "advantage": answer.advantage,
            "tokens": tokens,
            "stats": stats,
            "histogram": histogram,
            "group_stats": group_stats,
            "pivots": [
                {
                    "position": int(position),
                    "entropy": float(channels["entropy"][position]),
                    "logp": float(channels["logp"][position]),
                    "token": tokens[position],
                }
                for position in positions
            ],
            "temperature": trainer.temperature,
            "exact": True,
            **origin,
        }
        yield Trace(group.step, meta, encode_trace(channels))


def _channels(batch: MicroBatch, scored: Scored, row: int) -> dict[str, np.ndarray]:
    active, signals = batch.rollouts.mask[row], scored.signals
    channels = {
        "token_ids": batch.rollouts.completion_ids,
        "entropy": scored.entropies,
        "logp": scored.logps,
        "progress": signals.progress,
        "gate": signals.gates,
        "normalized_progress": signals.normalized_progress,
        "psi": signals.psi,
        "advantage": scored.advantages,
    }
    if scored.leverage_norms is not None:
        channels["leverage"] = scored.advantages.abs() * scored.leverage_norms
    return {name: values[row][active].detach().cpu().numpy() for name, values in channels.items()}


def _group_stats(group: TraceGroup) -> dict[str, float]:
    """What, with the stored channels, rebuilds W, s~, Psi and A^."""
    found = {"noise_floor": group.noise_floor}
    entropies = np.concatenate([answer.channels["entropy"] for answer in group.answers])
    if group.gate_stats is not None:
        found["entropy_mean"], found["entropy_std"] = group.gate_stats
    elif len(entropies):
        found |= {"entropy_mean": float(entropies.mean()), "entropy_std": float(entropies.std())}
    return found
