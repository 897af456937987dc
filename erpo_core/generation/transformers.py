"""Sampling with a transformers model: each prompt is computed once and its cache fanned out to its n answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One answer. ``token_ids`` ends with the stop token where ``finished``; otherwise it was cut at the limit."""

    token_ids: list[int]
    finished: bool


class TransformersEngine:
    """Samples from a causal language model (a PEFT model too) on whatever device it is."""

    def __init__(self, model, tokenizer) -> None:
        self._model = model
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @torch.no_grad()
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
        """n answers to each prompt, in order. The same seed and batch give the same answers.

        Args:
            prompts: Token ids, at least one per prompt.
            temperature: 0 decodes greedily.
            top_p: Share of probability kept, after the temperature.
            top_k: Tokens kept; 0 keeps all.
            stop_ids: Each ends an answer.

        Raises:
            ValueError: a prompt is empty.
        """
        if any(not len(prompt) for prompt in prompts):
            raise ValueError("prompts: an empty prompt")
        if not prompts:
            return []
        device = self._model.device
        generator = torch.Generator(device=device).manual_seed(seed)
        stops = torch.tensor(sorted(stop_ids), device=device, dtype=torch.long)
        answers: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        finished = [False] * len(answers)
        with _evaluating(self._model):
            logits, cache, mask = self._prefill(prompts, n, device)
            rows = torch.arange(len(answers), device=device)
            for step in range(max_new_tokens):
                chosen = _sample(logits, temperature, top_p, top_k, generator)
                ended = torch.isin(chosen, stops)
                for row, token, end in zip(rows.tolist(), chosen.tolist(), ended.tolist(), strict=True):
                    answers[row].append(token)
                    finished[row] = end
                going = (~ended).nonzero().squeeze(1)
                if not len(going) or step + 1 == max_new_tokens:
                    break
                if len(going) < len(rows):
                    # Finished answers leave the batch: they would only keep the others waiting.
                    rows, chosen, mask = rows[going], chosen[going], mask[going]
                    cache.batch_select_indices(going)
                logits, mask = self._decode(chosen, cache, mask)
        samples = [Sample(ids, end) for ids, end in zip(answers, finished, strict=True)]
        return [samples[start : start + n] for start in range(0, len(samples), n)]

    def _prefill(self, prompts: Sequence[Sequence[int]], n: int, device) -> tuple[Tensor, object, Tensor]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        if n > 1:
            cache.batch_repeat_interleave(n)
        return output.logits[:, -1].repeat_interleave(n, 0), cache, mask.repeat_interleave(n, 0)

    def _decode(self, chosen: Tensor, cache, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = self._model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1], mask


@contextmanager
def _evaluating(model) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _sample(logits_BV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    logits_BV = logits_BV.float()
    if temperature == 0:
        return logits_BV.argmax(1)
    logits_BV = logits_BV / temperature
    if top_k:
        least = logits_BV.topk(min(top_k, logits_BV.shape[1]), dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    probs_BV = logits_BV.softmax(1)
    if top_p < 1:
        ordered, index = probs_BV.sort(1, descending=True)
        # The token that crosses the share is kept.
        dropped = ordered.cumsum(1) - ordered >= top_p
        probs_BV = probs_BV.scatter(1, index, ordered.masked_fill(dropped, 0.0))
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(1)
