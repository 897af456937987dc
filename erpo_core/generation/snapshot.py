"""A float32 copy of a LoRA policy with the update inside the weights, to sample from on a CPU.

Decoding reads every weight for a handful of rows, so what counts is memory traffic and the number of small products.
The policy itself is never merged: its base weights are the reference. Weights without an adapter are shared with it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 16
"""For which the layout of a packed weight is chosen; it serves any number."""


class PackedLinear(nn.Module):
    """``nn.Linear`` in float32 on a CPU, its weight in the layout that oneDNN's kernels read (as TorchInductor freezes
    models): a third less time than ``nn.Linear`` takes at 16 rows, two fifths less at 8. Empty until :meth:`fill`."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias

    def fill(self, weight: Tensor) -> None:
        """Take a copy of this weight, (out, in)."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def forward(self, states: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, "none", [], "")


class PolicySnapshot:
    """The policy as it is at the last :meth:`refresh`."""

    def __init__(self, policy: Any) -> None:
        base = policy.get_base_model()
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.model = copy.deepcopy(base, shared).eval()
        for module in self.model.modules():
            # What TRL or accelerate put over a method still calls the module that was copied.
            module.__dict__.pop("forward", None)
        self._adapted: list[tuple[Any, PackedLinear]] = []
        for name, module in base.named_modules():
            if hasattr(module, "get_delta_weight"):
                self._adapted.append((module, PackedLinear(module.get_base_layer().bias)))
                self.model.set_submodule(name, self._adapted[-1][1])
        head = base.get_output_embeddings()
        if type(head) is nn.Linear:
            packed = PackedLinear(head.bias)
            packed.fill(head.weight.detach())
            self.model.set_output_embeddings(packed)

    @staticmethod
    def suits(policy: Any) -> bool:
        """Whether the copy would be the policy: plain LoRA on linear layers, all in float32, on a CPU with oneDNN."""
        from peft import PeftModel

        if not isinstance(policy, PeftModel) or policy.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if any(parameter.dtype != torch.float32 for parameter in policy.parameters()):
            return False
        adapted = [module for module in policy.modules() if hasattr(module, "get_delta_weight")]
        return bool(adapted) and all(map(_is_plain, adapted))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take in the policy's active adapters as they are now."""
        for module, linear in self._adapted:
            added = [module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A]
            linear.fill(sum(added, module.get_base_layer().weight))


def _is_plain(module: Any) -> bool:
    """LoRA and nothing else: no DoRA or other variant, no bias in the update."""
    from peft.tuners.lora import Linear

    return type(module) is Linear and not module.lora_variant and not any(module.lora_bias.values())
