"""Mixed into vLLM's worker (``worker_extension_cls``): takes in a policy, and says which adapter it really holds."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from erpo_core.generation.adapters import digest_of, scaled_pairs


class PolicyWorker:
    """What ``LLM.collective_rpc`` can ask of a worker."""

    def read_weights(self, folder: str) -> None:
        """Take the safetensors of this folder in place of every weight."""
        self.model_runner.reload_weights(weights_path=folder)
        if self.device.type == "cpu":
            _lay_out(self.model_runner.get_model())

    @property
    def _adapters(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager

    def modules_left_out(self, adapter_id: int) -> list[str]:
        """What the adapter under this number changes and the model has not, by name: vLLM reads it and does not say."""
        return sorted(set(self._adapters.get_adapter(adapter_id).loras) - set(self._adapters.modules))

    def held_adapter_digest(self, adapter_id: int) -> str | None:
        """Digest of the tensors under this number; None if there is no such adapter."""
        held = self._adapters.get_adapter(adapter_id)
        if held is None:
            return None
        pairs = [pair for weights in held.loras.values() for pair in _pairs(weights)]
        return digest_of(scaled_pairs(pairs, pairs[0][0].dtype))


def _lay_out(model: Any) -> None:
    """Bring weights into the layout that vLLM's kernels for CPUs read, which it does when it starts and never again: of
    a tied head, which computes with a packed copy, and of experts."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def _pairs(weights: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(A, B, the scale that is not in B yet) of a module, or of each of the modules that vLLM packs into one."""
    if not weights.is_packed:
        yield weights.lora_a, weights.lora_b, weights.scaling
        return
    for down, up, scale in zip(weights.lora_a, weights.lora_b, weights.scaling, strict=True):
        if down is not None:
            yield down, up, scale
