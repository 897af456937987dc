"""Rows of tokens: from flat scores to (B, T), and over micro-batches of unequal width."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from erpo_core.logits import TokenScores
from erpo_core.trainer.scoring import spread


def spread_scores(scores: TokenScores, mask: Tensor) -> dict[str, Tensor]:
    """The columns of :class:`Scored`, (B, T). Without a reference the policy stands for it."""
    apart = scores.logps.detach()
    columns = {
        "logps": scores.logps,
        "ref_logps": apart if scores.ref_logps is None else scores.ref_logps,
        "entropies": scores.entropies,
        "leverage_norms": scores.leverage_norms,
        "kls": torch.zeros_like(apart) if scores.kls is None else scores.kls,
    }
    return {name: spread(values, mask) for name, values in columns.items()}


def pad_logps(given: Sequence[Sequence[float] | None], like: Tensor) -> Tensor:
    """(B, T) float32, as wide as ``like``; NaN behind the end, and where nothing is given."""
    rows = torch.full(like.shape, torch.nan)
    for row, logps in enumerate(given):
        if logps is not None:
            rows[row, : len(logps)] = torch.tensor(logps)
    return rows.to(like.device)


def stack_rows(rows: list[Tensor]) -> Tensor:
    """(B, T) of several micro-batches, padded with 0 to the widest."""
    width = max(values.shape[1] for values in rows)
    return torch.cat([pad(values, (0, width - values.shape[1])) for values in rows])


def cut_columns(values: Tensor, like: Tensor) -> Tensor:
    return values[:, : like.shape[1]] if values.ndim > 1 else values


def prompt_runs(prompt_ids: list, num_generations: int) -> int:
    """How many adjacent rows share a prompt: G, or what of a group lies on this rank or in this micro-batch."""
    count = len(prompt_ids)
    return num_generations if count % num_generations == 0 else _largest_run(prompt_ids, num_generations)


def _largest_run(prompt_ids: list, num_generations: int) -> int:
    """The largest run length that cuts the rows into runs of one prompt each."""
    return next(
        size
        for size in range(min(len(prompt_ids), num_generations), 0, -1)
        if len(prompt_ids) % size == 0
        and all(prompt_ids[place] == prompt_ids[place - place % size] for place in range(len(prompt_ids)))
    )
