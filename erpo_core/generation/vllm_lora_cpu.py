"""LoRA in vLLM's CPU build, where all tokens of a batch have one adapter, as an engine of ours ever loads.

vLLM copies the adapter's weights for every token and multiplies row by row, which takes most of a decoding step. Here
they are two plain products.
"""

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class PlainProducts(PunicaWrapperCPU):
    """vLLM's wrapper; batches of several adapters, or of none, go its way."""

    _only: int | None = None
    """The adapter's place among the stacked weights; None where there is not one for all."""

    def update_metadata(self, *args, **kwargs) -> None:
        """As vLLM's, which calls it when other requests are served."""
        super().update_metadata(*args, **kwargs)
        places = self.token_lora_indices
        alike = len(places) > 0 and bool((places == places[0]).all()) and places[0] >= 0
        self._only = int(places[0]) if alike else None

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs,
    ) -> None:
        """As vLLM's: x @ A @ B * scale is added to the slices of y (tokens, features)."""
        if self._only is None:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        slices = y.view(-1, y.shape[-1]).split(output_slices, dim=1)
        for part, down, up in zip(slices, lora_a_stacked, lora_b_stacked, strict=True):
            self._add(part, x, down, up, scale)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs
    ) -> None:
        """As vLLM's, which calls it for the head even where no adapter has one."""
        if self._only is None:
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)
            return
        logits = y.view(-1, y.shape[-1])[:, : lora_b_stacked.shape[-2]]
        self._add(logits, x, lora_a_stacked, lora_b_stacked, scale)

    def _add(self, part: Tensor, x: Tensor, downs: Tensor, ups: Tensor, scale: float) -> None:
        """What lies between the products is float32, as in vLLM, until it meets the second one."""
        down, up = downs[self._only, 0], ups[self._only, 0]
        inner = torch.mm(x.view(-1, x.shape[-1]).float(), down.float().T)
        part.addmm_(inner.to(part.dtype), up.T, alpha=scale)
