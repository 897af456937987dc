"""One teacher-forced pass over an answer: its channels, the hidden states of its tokens, and its trace record."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from erpo_core.analysis.statistics import sequence_stats
from erpo_core.analysis.tokens import display_tokens
from erpo_core.codec import encode_trace
from erpo_core.heads import body_of, check_head, logit_form
from erpo_core.logits import TokenScores, score_tokens, top_alternatives
from erpo_core.records import Trace
from erpo_core.rewards.verify import Verifier


@dataclass
class Scored:
    """One answer with its channels; ``hidden`` (tokens, H) is kept for the alternatives at chosen positions."""

    prompt: str
    group: int
    sample: int
    token_ids: list[int]
    columns: dict[str, np.ndarray]
    countable: np.ndarray
    """(tokens,) bool, false on special tokens: they are no pivots and no part of any statistic."""
    hidden: torch.Tensor
    gold: str | None = None


@torch.no_grad()
def score_answer(
    model,
    tokenizer,
    prompt_tokens: list[int],
    token_ids: list[int],
    *,
    temperature: float,
    reference: bool = False,
    prompt: str = "",
    group: int = 0,
    sample: int = 0,
    gold: str | None = None,
) -> Scored:
    """Score an answer's tokens.

    Args:
        prompt_tokens: Ids of the prompt, at least one.
        token_ids: Ids of the answer.
        temperature: Of the distribution whose entropy is measured.
        reference: Where the model is an adapter, also score its base: ``progress`` is log p - log p of the base.
        prompt, group, sample, gold: What its trace says of the answer.
    """
    hidden, scores = _pass(model, prompt_tokens, token_ids, temperature)
    columns = {
        "token_ids": np.array(token_ids),
        "entropy": _numpy(scores.entropies),
        "logp": _numpy(scores.logps),
        "top_prob": _numpy(scores.top_probs),
        "varentropy": _numpy(scores.varentropies),
        "rank": _numpy(scores.ranks),
    }
    if reference and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            _, base = _pass(model, prompt_tokens, token_ids, temperature)
        columns["progress"] = _numpy(scores.logps - base.logps)
    return Scored(prompt, group, sample, token_ids, columns, countable_tokens(tokenizer, token_ids), hidden, gold)


def countable_tokens(tokenizer, token_ids: list[int]) -> np.ndarray:
    """(tokens,) bool, false on special tokens."""
    special = set(tokenizer.all_special_ids)
    return np.array([token not in special for token in token_ids])


def prompt_id(group: int) -> str:
    """Names a group of answers in stored records."""
    return f"prompt-{group}"


def _pass(model, prompt_tokens: list[int], token_ids: list[int], temperature: float) -> tuple[Any, TokenScores]:
    """The entropy of token t is that of the distribution it was drawn from: the logits one position earlier."""
    check_head(model)
    device = model.device
    ids = torch.tensor([prompt_tokens + token_ids], device=device)
    hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt_tokens) - 1 : -1]
    head = model.get_output_embeddings()
    targets = torch.tensor(token_ids, device=device)
    bias = getattr(head, "bias", None)
    form = logit_form(model.config)
    scores = score_tokens(hidden, head.weight, targets, temperature=temperature, bias=bias, form=form)
    return hidden, scores


@torch.no_grad()
def best_tokens(model, scored: Scored, positions: np.ndarray, k: int, *, temperature: float):
    """Ids and log-probabilities, each (positions, k), best first: a second product with the head, of those rows."""
    head = model.get_output_embeddings()
    rows = scored.hidden[torch.from_numpy(np.asarray(positions, dtype=np.int64)).to(scored.hidden.device)]
    bias, form = getattr(head, "bias", None), logit_form(model.config)
    ids, logps = top_alternatives(rows, head.weight, k, temperature=temperature, bias=bias, form=form)
    return ids.cpu().numpy(), logps.cpu().numpy()


def trace_of(
    model,
    tokenizer,
    scored: Scored,
    pivots: np.ndarray,
    info: dict[str, Any],
    *,
    temperature: float,
    top_k: int,
    verifier: Verifier | None = None,
) -> Trace:
    """The record that stores an answer's channels, with up to ``top_k`` alternatives at its pivots.

    Args:
        verifier: judges an answer whose right one is known.
    """
    text = tokenizer.decode(scored.token_ids, skip_special_tokens=True)
    tokens = display_tokens(tokenizer, scored.token_ids)
    entropies = scored.columns["entropy"]
    stats, histogram = sequence_stats(entropies[scored.countable])
    alternatives = _alternatives(model, tokenizer, scored, pivots, top_k, temperature)
    meta = {
        "prompt_id": prompt_id(scored.group),
        "group": scored.group,
        "sample": scored.sample,
        "prompt": scored.prompt,
        "completion": text,
        "num_tokens": len(tokens),
        "tokens": tokens,
        "stats": stats,
        "histogram": histogram,
        "group_stats": {},
        "pivots": [
            {
                "position": int(position),
                "entropy": float(entropies[position]),
                "logp": float(scored.columns["logp"][position]),
                "token": tokens[position],
                "alternatives": found,
            }
            for position, found in zip(pivots, alternatives, strict=True)
        ],
        "gold": scored.gold,
        "verdict": str(verifier.check(scored.gold, text)) if verifier and scored.gold else None,
        "special_positions": np.flatnonzero(~scored.countable).tolist(),
        "model_digest": info["model_digest"],
        "adapter_digest": info["adapter_digest"],
        "tokenizer_digest": info["tokenizer_digest"],
        "dtype": info["dtype"],
        "head_dtype": "float32",
        "temperature": temperature,
        "exact": True,
    }
    return Trace(0, meta, encode_trace(scored.columns))


def _alternatives(model, tokenizer, scored: Scored, pivots: np.ndarray, top_k: int, temperature: float) -> list[list]:
    if not top_k or not len(pivots):
        return [[] for _ in pivots]
    ids, logps = best_tokens(model, scored, pivots, top_k, temperature=temperature)
    return [
        [
            {"token": tokenizer.decode([token]), "token_id": token, "logp": logp}
            for token, logp in zip(row_ids, row_logps, strict=True)
        ]
        for row_ids, row_logps in zip(ids.tolist(), logps.tolist(), strict=True)
    ]


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
