"""Sampling with a transformers model in this process.

What makes it fast for groups of answers to one question: a prompt is computed once, and what all prompts begin with
once for all; the key-value cache is repeated for the n answers and grows in place; an answer that has ended leaves the
batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from erpo_core.generation.base import Sample, Sampling, check_call
from erpo_core.generation.cache import roomy_cache
from erpo_core.prefill import pad_prompts, prefill


class TransformersEngine:
    """Samples from a causal language model, a PEFT model included."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

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
        """``n`` answers to each prompt; the same arguments give the same answers.

        An answer's random numbers depend on the seed and its place (prompt, sample) alone, not on when others end.

        Raises:
            ValueError: an empty prompt, or a bound below 1.
        """
        if not prompts:
            return []
        check_call(prompts, n, max_new_tokens)
        sampling = Sampling(temperature, top_p, top_k)
        with torch.no_grad(), _evaluating(self.model):
            answers = self._decode(prompts, n, sampling, max_new_tokens, stop_ids, seed)
        ends = set(stop_ids)
        samples = [Sample(row, row[-1] in ends, logps) for row, logps in zip(*answers, strict=True)]
        return [samples[start : start + n] for start in range(0, len(samples), n)]

    def generate_each(self, calls: Iterable[Mapping[str, Any]]) -> Iterator[list[list[Sample]]]:
        """One call after the other."""
        return (self.generate(**call) for call in calls)

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
    ) -> tuple[list[list[int]], list[list[float]] | list[None]]:
        """Token ids of all B = len(prompts) * n answers, prompt by prompt, and their log-probabilities."""
        device = self.model.device
        padded_prompts = pad_prompts(prompts, self.tokenizer.pad_token_id or 0, device)
        start = prefill(self.model, padded_prompts, cache=roomy_cache(self.model.config), logits_to_keep=1)
        cache = start.past_key_values
        cache.batch_repeat_interleave(n)
        logits = start.logits[:, -1].repeat_interleave(n, dim=0)
        mask = padded_prompts.mask.repeat_interleave(n, dim=0)
        padded = not bool(mask.all())

        generator = torch.Generator().manual_seed(seed)
        stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
        total = len(prompts) * n
        alive = torch.arange(total, device=device)  # which answer a row of the batch is
        answers: list[list[int]] = [[] for _ in range(total)]
        logps: list[list[float]] = [[] for _ in range(total)]
        for step in range(max_new_tokens):
            # One number for every answer at every step, the ended ones too: nobody's draw depends on the others' ends.
            uniform = torch.rand(total, generator=generator, dtype=torch.float64).to(device)[alive]
            chosen = self._choose(draw(logits, sampling, uniform), alive, step)
            given = (
                logps_of(logits, chosen, sampling.temperature).tolist() if sampling.is_whole else [None] * len(alive)
            )
            for answer, token, logp in zip(alive.tolist(), chosen.tolist(), given, strict=True):
                answers[answer].append(token)
                logps[answer].append(logp)
            going = ~torch.isin(chosen, stops)
            if step + 1 == max_new_tokens or not bool(going.any()):
                break
            if not bool(going.all()):
                kept = going.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                alive, chosen, mask = alive[kept], chosen[kept], mask[kept]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            logits = self._step(chosen, cache, mask, padded)
        return answers, logps if sampling.is_whole else [None] * total

    def _choose(self, drawn: Tensor, alive: Tensor, step: int) -> Tensor:
        """The tokens (B,) that answers ``alive`` (B,) get at ``step``; a subclass may want others than those drawn."""
        return drawn

    def _step(self, chosen: Tensor, cache: Any, mask: Tensor, padded: bool) -> Tensor:
        """Logits (B, V) after one more token (B,) of each answer."""
        out = self.model(
            input_ids=chosen[:, None],
            attention_mask=mask if padded else None,  # without one, attention takes its fast path
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Token ids (B,) from logits (B, V), by inverting the cumulative distribution at ``uniform`` (B,) in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    probs = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        probs = _nucleus(probs, sampling.top_p)
    cumulative = probs.double().cumsum(dim=-1)
    # The first token whose cumulative probability exceeds the draw, so never one of probability 0.
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def logps_of(logits: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """(B,) log-probabilities of the tokens under the whole distribution that they were drawn from."""
    scaled = logits.float() / temperature
    return scaled.gather(1, chosen[:, None]).squeeze(1) - scaled.logsumexp(1)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """The most likely tokens that together reach ``top_p``, the first one always among them; the others are 0."""
    ordered, order = probs.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return probs.masked_fill(outside.scatter(1, order, outside), 0.0)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout inside; every module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
