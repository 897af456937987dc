"""Sampling with a transformers model in this process.

What makes it fast for groups of answers to one question: a prompt is computed once, and what all prompts begin with
once for all; the key-value cache is repeated for the n answers and grows in place; an answer that has ended leaves the
batch. On CUDA, where small batches wait for launches, a token is one recorded graph.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from erpo_core.errors import RunError
from erpo_core.generation import fixed
from erpo_core.generation.base import Sample, Sampling, Watch, check_call
from erpo_core.generation.cache import is_plain, roomy_cache
from erpo_core.generation.drawing import draw, logps_of
from erpo_core.prefill import pad_prompts, prefill


class TransformersEngine:
    """Samples from a causal language model, a PEFT model included.

    Args:
        fixed_shapes: Decode by :mod:`erpo_core.generation.fixed` where the model allows it; by default on CUDA.
    """

    def __init__(self, model: Any, tokenizer: Any, *, fixed_shapes: bool | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fixed_shapes = fixed_shapes
        self.watch: Watch | None = None

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
            RunError: ``model_unsupported``: the model does not use transformers' ``DynamicCache``.
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
        cache = roomy_cache(self.model.config)
        # A window counts padding, and a state decays over it: only in front of all tokens it does no harm.
        padded_prompts = pad_prompts(prompts, self.tokenizer.pad_token_id or 0, device, share=is_plain(cache))
        start = prefill(self.model, padded_prompts, cache=cache, logits_to_keep=1)
        if getattr(start, "past_key_values", None) is not cache:
            name = type(self.model).__name__
            raise RunError(f"{name} keeps its state in a cache of its own; sample with vLLM", code="model_unsupported")
        cache.reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(n))
        logits = start.logits[:, -1].repeat_interleave(n, dim=0)
        mask = padded_prompts.mask.repeat_interleave(n, dim=0)
        answers = Answers(len(prompts) * n, sampling, max_new_tokens, set(stop_ids), seed, self.watch)
        wanted = device.type == "cuda" if self.fixed_shapes is None else self.fixed_shapes
        if wanted and fixed.suits(self.model, cache):
            self._decode_fixed(answers, cache, mask, logits)
        else:
            self._decode_growing(answers, cache, mask, logits)
        return answers.token_ids, answers.logps if sampling.is_whole else [None] * len(answers.token_ids)

    def _decode_growing(self, answers: "Answers", cache: Any, mask: Tensor, logits: Tensor) -> None:
        """A token at a time; the batch holds the answers that go on, and no more."""
        device, sampling = logits.device, answers.sampling
        padded = not bool(mask.all())
        alive = torch.arange(len(logits), device=device)  # which answer a row of the batch is
        for step in range(answers.max_new_tokens):
            uniform = answers.uniform(1)[0].to(device)[alive]
            chosen = self._choose(draw(logits, sampling, uniform), alive, step)
            given = logps_of(logits, chosen, sampling.temperature).tolist() if sampling.is_whole else None
            going = answers.append(alive.tolist(), [chosen.tolist()], [given])
            if not going:
                return
            if len(going) < len(alive):
                kept = torch.tensor(going, device=device)
                cache.reorder_cache(kept)  # recurrent layers know no other selection
                alive, chosen, mask = alive[kept], chosen[kept], mask[kept]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            logits = self._step(chosen, cache, mask, padded)

    def _decode_fixed(self, answers: "Answers", cache: Any, mask: Tensor, logits: Tensor) -> None:
        """Some tokens between two looks at who has ended; a large batch is made anew when half of it has."""
        alive = torch.arange(len(logits), device=logits.device)
        layers = ((layer.keys, layer.values) for layer in cache.layers)
        batch = fixed.FixedBatch(self.model, layers, mask, logits, alive, step=0)
        cache.layers.clear()  # what it held has been copied
        while True:
            tokens = min(fixed.CHUNK, batch.left, answers.left)
            batch.uniform[:tokens] = answers.uniform(tokens).to(logits.device)[:, batch.alive]
            batch.advance(tokens, answers.sampling, self._choose)
            logps = batch.logps[:tokens].tolist() if answers.sampling.is_whole else [None] * tokens
            going = answers.append(batch.alive.tolist(), batch.chosen[:tokens].tolist(), logps)
            if not going:
                return
            if (len(batch.alive) > fixed.SMALL and 2 * len(going) <= len(batch.alive)) or not batch.left:
                batch = batch.selected(torch.tensor(going, device=logits.device))

    def _choose(self, drawn: Tensor, alive: Tensor, step: int | Tensor) -> Tensor:
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


class Answers:
    """Answers that grow side by side."""

    def __init__(
        self,
        count: int,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: set[int],
        seed: int,
        watch: Watch | None = None,
    ) -> None:
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.token_ids: list[list[int]] = [[] for _ in range(count)]
        self.logps: list[list[float]] = [[] for _ in range(count)]
        self.left = max_new_tokens
        """Tokens that an answer may still get."""
        self._stops, self._watch = stop_ids, watch
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, tokens: int) -> Tensor:
        """(tokens, count) float64 in [0, 1) for the next tokens.

        Every answer has a number at every token, the ended ones too: nobody's draw depends on the others' ends.
        """
        size = len(self.token_ids)
        drawn = [torch.rand(size, generator=self._generator, dtype=torch.float64) for _ in range(tokens)]
        return torch.stack(drawn)

    def append(self, alive: list[int], chosen: list[list[int]], logps: list[list[float] | None]) -> list[int]:
        """The next tokens of the answers ``alive``, a list for each token; what follows an answer's end is dropped.

        Returns: the places in ``alive`` of the answers that go on.
        """
        self.left -= len(chosen)
        ended = [bool(self.token_ids[answer]) and self.token_ids[answer][-1] in self._stops for answer in alive]
        open_before, added = ended.count(False), 0
        for tokens, values in zip(chosen, logps, strict=True):
            for place, answer in enumerate(alive):
                if ended[place]:
                    continue
                self.token_ids[answer].append(tokens[place])
                added += 1
                if values is not None:
                    self.logps[answer].append(values[place])
                ended[place] = tokens[place] in self._stops
        going = [place for place, done in enumerate(ended) if not done] if self.left else []
        if self._watch is not None:
            self._watch(added, open_before - len(going))
        return going


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
