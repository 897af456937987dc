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

if TYPE_CHECKING:
    from erpo_core.trainer.batches import TraceGroup
    from erpo_core.trainer.trainer import ERPOTrainer


def trace_records(trace: "TraceGroup", trainer: "ERPOTrainer", origin: dict[str, Any]) -> Iterator[Trace]:
    """One record per response of the kept groups."""
    batch, scored, size = trace.batch, trace.scored, trainer.num_generations
    rows = range(min(len(batch.examples), trace.groups * size))
    first_group = batch.first_row // size
    columns = [_columns(trace, row) for row in rows]
    pivots = find_pivots([found["entropy"] for found in columns], DetectorSpec())
    for row, found, positions in zip(rows, columns, pivots, strict=True):
        tokens = display_tokens(trainer.processing_class, found["token_ids"].tolist())
        stats, histogram = sequence_stats(found["entropy"])
        example = batch.examples[row]
        meta = {
            "prompt_id": str(example.get("prompt_id", f"group-{first_group + row // size}")),
            "group": first_group + row // size,
            "sample": row % size,
            "prompt": example.get("problem") or str(example["prompt"]),
            "completion": batch.completions[row],
            "num_tokens": len(tokens),
            "reward": float(batch.rewards[row]),
            "verdict": batch.verdicts[row] if batch.verdicts else None,
            "advantage": float(scored.signals.group_advantages[row]),
            "tokens": tokens,
            "stats": stats,
            "histogram": histogram,
            "group_stats": _group_stats(trace, row // size, size),
            "pivots": [
                {
                    "position": int(position),
                    "entropy": float(found["entropy"][position]),
                    "logp": float(found["logp"][position]),
                    "token": tokens[position],
                }
                for position in positions
            ],
            "temperature": trainer.temperature,
            "exact": True,
            **origin,
        }
        yield Trace(trace.step, meta, encode_trace(found))


def _columns(trace: "TraceGroup", row: int) -> dict[str, np.ndarray]:
    batch, scored = trace.batch, trace.scored
    active = batch.rollouts.mask[row]
    signals = scored.signals
    channels = {
        "token_ids": batch.rollouts.completion_ids,
        "entropy": scored.entropies,
        "logp": scored.logps,
        "progress": signals.progress,
        "gate": signals.gates,
        "normalized_progress": signals.normalized_progress,
        "psi": signals.psi,
        "advantage": scored.advantages,
        "leverage": scored.advantages.abs() * scored.leverage_norms,
    }
    return {name: values[row][active].detach().cpu().numpy() for name, values in channels.items()}


def _group_stats(trace: "TraceGroup", group: int, size: int) -> dict[str, float]:
    """What, with the stored channels, rebuilds W, s~, Psi and A^."""
    rows = slice(group * size, (group + 1) * size)
    active = trace.batch.rollouts.mask[rows]
    entropies = trace.scored.entropies[rows][active]
    if not len(entropies):
        return {"noise_floor": trace.noise_floor}
    return {
        "entropy_mean": entropies.mean().item(),
        "entropy_std": entropies.std(correction=0).item(),
        "noise_floor": trace.noise_floor,
    }
