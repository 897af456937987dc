"""A copy of a LoRA policy to sample from on a CPU.

Decoding reads every weight for a handful of rows, so what counts is memory traffic and the number of small products.
The policy itself is never merged: its base weights are the reference. In the copy of a float32 base the update is part
of the weights. In that of a bfloat16 base it is a product of its own, because weights that are rounded to eight bits
would not move by it; the head is float32 there, as in scoring. What has no adapter is shared with the policy.

Autocast, which would round all weights anew for each token, does not reach the copy: where scoring is rounded by it,
the answers come from a policy that is the same but for rounding.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 16
"""For which the layout of a packed weight is chosen; it serves any number."""


class PackedLinear(nn.Module):
    """``nn.Linear`` on a CPU, its weight in the layout that oneDNN's kernels read (as TorchInductor freezes models): a
    third less time than ``nn.Linear`` takes at 16 rows, two fifths less at 8. Multiplies in the dtype of its weight,
    float32 or bfloat16, and answers in float32. Empty until :meth:`fill`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # for models that look at them, and as with PEFT's layers
        self.updates: list[tuple[Tensor, Tensor]] = []
        """(in, r) and (r, out) in float32, whose product is added to the weight."""

    def fill(self, weight: Tensor) -> None:
        """Take a copy of this weight, (out, in)."""
        self._dtype, self._bias = weight.dtype, None if self.bias is None else self.bias.detach().to(weight.dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def forward(self, states: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        operands = states.to(self._dtype), self._packed, self._bias
        found = torch.ops.mkldnn._linear_pointwise(*operands, "none", [], "").float()
        for down, up in self.updates:
            found.flatten(0, -2).addmm_(states.float().flatten(0, -2) @ down, up)
        return found


class PolicySnapshot:
    """The policy as it is at the last :meth:`refresh`."""

    def __init__(self, policy: Any) -> None:
        base = policy.get_base_model()
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.model = copy.deepcopy(base, shared).eval()
        for module in self.model.modules():
            # What TRL or accelerate put over a method still calls the module that was copied.
            module.__dict__.pop("forward", None)
        self.model.forward = torch.autocast("cpu", enabled=False)(self.model.forward)
        self._adapted: list[tuple[Any, PackedLinear]] = []
        for name, module in base.named_modules():
            if hasattr(module, "get_delta_weight"):
                packed = PackedLinear(module.get_base_layer())
                packed.fill(module.get_base_layer().weight.detach())
                self._adapted.append((module, packed))
                self.model.set_submodule(name, packed)
        head = base.get_output_embeddings()
        if type(head) is nn.Linear:
            packed = PackedLinear(head)
            packed.fill(head.weight.detach().float())
            self.model.set_output_embeddings(packed)

    @staticmethod
    def suits(policy: Any) -> bool:
        """Whether the copy would be the policy: plain LoRA on linear layers of one dtype, on a CPU that computes in it
        with oneDNN."""
        from peft import PeftModel

        if not isinstance(policy, PeftModel) or policy.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        dtypes = {parameter.dtype for name, parameter in policy.named_parameters() if "lora_" not in name}
        rounded = dtypes == {torch.bfloat16} and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        adapted = [module for module in policy.modules() if hasattr(module, "get_delta_weight")]
        return (dtypes == {torch.float32} or rounded) and bool(adapted) and all(map(_is_plain, adapted))

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def refresh(self) -> None:
        """Take in the policy's active adapters as they are now."""
        for module, packed in self._adapted:
            weight = module.get_base_layer().weight
            names = [name for name in module.active_adapters if name in module.lora_A]
            if weight.dtype == torch.float32:
                packed.fill(sum(map(module.get_delta_weight, names), weight))
            else:
                packed.updates = [_factors(module, name) for name in names]


def _factors(module: Any, name: str) -> tuple[Tensor, Tensor]:
    """(in, r) and (r, out) of a layer's adapter, scaled."""
    down, up = module.lora_A[name].weight.float(), module.lora_B[name].weight.float() * module.scaling[name]
    return down.T.contiguous(), up.T.contiguous()


def _is_plain(module: Any) -> bool:
    """LoRA and nothing else: no DoRA or other variant, no bias in the update."""
    from peft.tuners.lora import Linear

    plain = type(module) is Linear and type(module.get_base_layer()) is nn.Linear
    return plain and not module.lora_variant and not any(module.lora_bias.values())
