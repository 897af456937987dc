"""One entropy analysis: answers given or sampled, scored by one teacher-forced pass, stored with their pivots."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from erpo_core.analysis.detectors import DETECTOR_VERSION, find_pivots
from erpo_core.analysis.statistics import sequence_stats
from erpo_core.analysis.tokens import display_tokens
from erpo_core.codec import encode_trace
from erpo_core.errors import SpecError
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.job import JobInputs, Stop
from erpo_core.logits import TokenScores, score_tokens, top_alternatives
from erpo_core.models import load_policy
from erpo_core.prompts import prompt_ids, stop_token_ids
from erpo_core.records import Progress, Resolved, Result, Sink, Trace
from erpo_core.specs.entropy import EntropySpec

_TOP_TOKENS = 20


@dataclass
class Scored:
    """One answer with its channels; ``hidden`` is kept until its pivots are known, for their alternatives."""

    prompt: str
    group: int
    sample: int
    token_ids: list[int]
    columns: dict[str, np.ndarray]
    countable: np.ndarray
    hidden: torch.Tensor


def run_entropy(spec: EntropySpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Analyse and report. Returns the summary; ``{"stopped": True}`` where ``stop`` ended it early.

    Raises:
        SpecError: a text is empty or longer than the model's context.
    """
    started = time.monotonic()
    sink.emit(Progress("load", 0, 1))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer, info = load_policy(inputs, dtype=dtype)
    model.eval()
    sink.emit(Resolved({"model": info, "versions": {n: version(n) for n in ("torch", "transformers", "peft")}}))
    scored = []
    pairs = list(_answers(spec, model, tokenizer))
    for done, (prompt, group, sample, token_ids) in enumerate(pairs):
        if stop.requested:
            return {"stopped": True}
        ids = prompt_ids(tokenizer, prompt, spec.prompt)
        scored.append(_score(spec, model, tokenizer, prompt, group, sample, ids, token_ids))
        sink.emit(Progress("score", done + 1, len(pairs)))
    pivots = find_pivots(
        [np.where(s.countable, s.columns["entropy"], np.nan) for s in scored], spec.detector, [s.group for s in scored]
    )
    top: dict[str, list[float]] = {}
    for sequence, positions in zip(scored, pivots, strict=True):
        trace = _trace(spec, model, tokenizer, sequence, positions, info)
        for pivot in trace.meta["pivots"]:
            top.setdefault(pivot["token"], []).append(pivot["entropy"])
        sink.emit(trace)
    summary = _summary(scored, pivots, top) | {"seconds": time.monotonic() - started}
    sink.emit(Result(summary))
    return summary


def _answers(spec: EntropySpec, model, tokenizer) -> Iterator[tuple[str, int, int, list[int]]]:
    """(problem, group, sample, token ids of the answer)."""
    if spec.texts:
        for group, pair in enumerate(spec.texts):
            ids = tokenizer(pair.response, add_special_tokens=False)["input_ids"]
            if not ids:
                raise SpecError("an empty response", pointer=f"/texts/{group}/response", mend="give some text")
            yield pair.prompt, group, 0, ids
        return
    sampling = spec.sampling
    groups = TransformersEngine(model, tokenizer).generate(
        [prompt_ids(tokenizer, prompt, spec.prompt) for prompt in spec.prompts],
        n=spec.num_samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_completion_length,
        stop_ids=stop_token_ids(tokenizer),
        seed=sampling.seed,
    )
    for group, (prompt, samples) in enumerate(zip(spec.prompts, groups, strict=True)):
        for number, sample in enumerate(samples):
            yield prompt, group, number, sample.token_ids


@torch.no_grad()
def _score(spec, model, tokenizer, prompt, group, sample, prompt_tokens, token_ids) -> Scored:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(prompt_tokens) + len(token_ids) > limit:
        field = f"/texts/{group}/response" if spec.texts else f"/prompts/{group}"
        raise SpecError(
            f"prompt and answer have {len(prompt_tokens) + len(token_ids)} tokens, the model's context holds {limit}",
            pointer=field,
            mend="shorten the text",
        )
    hidden, scores = _pass(model, prompt_tokens, token_ids, spec.temperature)
    columns = {
        "token_ids": np.array(token_ids),
        "entropy": _numpy(scores.entropies),
        "logp": _numpy(scores.logps),
        "top_prob": _numpy(scores.top_probs),
        "varentropy": _numpy(scores.varentropies),
        "rank": _numpy(scores.ranks),
    }
    if spec.reference and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            _, reference = _pass(model, prompt_tokens, token_ids, spec.temperature)
        columns["progress"] = _numpy(scores.logps - reference.logps)
    special = set(tokenizer.all_special_ids)
    countable = np.array([token not in special for token in token_ids])
    return Scored(prompt, group, sample, token_ids, columns, countable, hidden)


def _pass(model, prompt_tokens: list[int], token_ids: list[int], temperature: float) -> tuple[Any, TokenScores]:
    """The entropy of token t is that of the distribution it was drawn from: the logits one position earlier."""
    from erpo_core.trainer.scoring import body_of, check_head

    check_head(model.config)
    device = model.device
    ids = torch.tensor([prompt_tokens + token_ids], device=device)
    hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt_tokens) - 1 : -1]
    head = model.get_output_embeddings()
    targets = torch.tensor(token_ids, device=device)
    scores = score_tokens(hidden, head.weight, targets, temperature=temperature, bias=getattr(head, "bias", None))
    return hidden, scores


def _trace(spec, model, tokenizer, sequence: Scored, positions: np.ndarray, info: dict[str, Any]) -> Trace:
    tokens = display_tokens(tokenizer, sequence.token_ids)
    entropies = sequence.columns["entropy"]
    stats, histogram = sequence_stats(entropies[sequence.countable])
    alternatives = _alternatives(spec, model, tokenizer, sequence, positions)
    meta = {
        "prompt_id": f"prompt-{sequence.group}",
        "group": sequence.group,
        "sample": sequence.sample,
        "prompt": sequence.prompt,
        "completion": tokenizer.decode(sequence.token_ids, skip_special_tokens=True),
        "num_tokens": len(tokens),
        "tokens": tokens,
        "stats": stats,
        "histogram": histogram,
        "group_stats": {},
        "pivots": [
            {
                "position": int(position),
                "entropy": float(entropies[position]),
                "logp": float(sequence.columns["logp"][position]),
                "token": tokens[position],
                "alternatives": found,
            }
            for position, found in zip(positions, alternatives, strict=True)
        ],
        "model_digest": info["model_digest"],
        "adapter_digest": info["adapter_digest"],
        "tokenizer_digest": info["tokenizer_digest"],
        "dtype": info["dtype"],
        "head_dtype": "float32",
        "temperature": spec.temperature,
        "exact": True,
    }
    return Trace(0, meta, encode_trace(sequence.columns))


@torch.no_grad()
def _alternatives(spec, model, tokenizer, sequence: Scored, positions: np.ndarray) -> list[list[dict[str, Any]]]:
    """A second product with the head, over the pivots' rows only."""
    if not spec.top_k_alternatives or not len(positions):
        return [[] for _ in positions]
    head = model.get_output_embeddings()
    rows = sequence.hidden[torch.from_numpy(positions).to(sequence.hidden.device)]
    ids, logps = top_alternatives(
        rows, head.weight, spec.top_k_alternatives, temperature=spec.temperature, bias=getattr(head, "bias", None)
    )
    return [
        [
            {"token": tokenizer.decode([token]), "token_id": token, "logp": logp}
            for token, logp in zip(row_ids, row_logps, strict=True)
        ]
        for row_ids, row_logps in zip(ids.tolist(), logps.tolist(), strict=True)
    ]


def _summary(scored: list[Scored], pivots: list[np.ndarray], top: dict[str, list[float]]) -> dict[str, Any]:
    entropies = np.concatenate([s.columns["entropy"][s.countable] for s in scored]) if scored else np.array([])
    stats, _ = sequence_stats(entropies)
    ranked = sorted(top.items(), key=lambda item: (-len(item[1]), -max(item[1])))[:_TOP_TOKENS]
    return {
        "num_sequences": len(scored),
        "num_tokens": len(entropies),
        "entropy": {name.removeprefix("h_"): value for name, value in stats.items()},
        "num_pivots": sum(map(len, pivots)),
        "top_pivot_tokens": [{"token": token, "count": len(h), "max_entropy": max(h)} for token, h in ranked],
        "detector_version": DETECTOR_VERSION,
    }


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
