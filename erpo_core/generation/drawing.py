"""One token of each answer from its logits."""

import torch
from torch import Tensor

from erpo_core.generation.base import Sampling


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
