"""A transformers model that takes one LoRA adapter after the other."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erpo_core.generation.transformers import TransformersEngine


class AdaptedEngine(TransformersEngine):
    """Samples from a base model with one adapter at a time on it, or none.

    In float32 the adapter is merged into the weights in memory: as exact, and faster. To take it out again by
    subtraction would leave its rounding behind, so the weights below it are copied first, into the host's memory.

    Args:
        keeps_base: whether they are: without it the first adapter is the last.
    """

    def __init__(self, model: Any, tokenizer: Any, *, keeps_base: bool) -> None:
        super().__init__(model, tokenizer)
        self._base = model
        self._keeps_base = keeps_base
        self._below: list[tuple[Tensor, Tensor]] = []

    def load_adapter(self, folder: Path) -> None:
        """Answers come from the base with this adapter on, from now on; the adapter before it is dropped."""
        from peft import PeftModel

        self.drop_adapter()
        self.model = PeftModel.from_pretrained(self._base, folder)
        if self._base.dtype != torch.float32:
            return
        if self._keeps_base:
            layers = [module.get_base_layer() for module in self.model.modules() if hasattr(module, "get_delta_weight")]
            self._below = [(layer.weight, layer.weight.detach().to("cpu", copy=True)) for layer in layers]
        self.model = self.model.merge_and_unload()

    @torch.no_grad()
    def drop_adapter(self) -> None:
        """Answers come from the base model again, to the last bit."""
        for weight, original in self._below:
            weight.copy_(original)
        self._below = []
        if self.model is not self._base:
            self.model = self.model.unload()
