"""A copy of a LoRA policy to sample from on a CPU.

Decoding reads every weight for a handful of rows, so what counts is memory traffic and the number of small products.
The policy itself is never merged: its base weights are the reference. In the copy of a float32 base the update is part
of the weights, and what has no adapter is shared with the policy. In that of a bfloat16 base the products alone are in
bfloat16, and the update is a product of its own: weights that are rounded to eight bits would not move by it.

Autocast, which would round all weights anew for each token, does not reach the copy: where scoring is rounded by it,
the answers come from a policy that is the same but for rounding.
"""

import copy
from collections.abc import Iterable
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
        adapted = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
        products = {name: module.get_base_layer() for name, module in adapted.items()}
        self._merges = next(iter(products.values())).weight.dtype == torch.float32
        if not self._merges:
            products |= _other_products(base, adapted)
        self.model = copy.deepcopy(base, _shared(base, products)).eval()
        for module in self.model.modules():
            # What TRL or accelerate put over a method still calls the module that was copied.
            module.__dict__.pop("forward", None)
        self.model.forward = torch.autocast("cpu", enabled=False)(self.model.forward)
        for name, linear in products.items():
            # Where updates are merged, refresh fills all of them.
            self.model.set_submodule(name, PackedLinear(linear) if self._merges else _packed(linear))
        self._adapted = [(module, self.model.get_submodule(name)) for name, module in adapted.items()]
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            self.model.set_output_embeddings(_packed(head))

    @staticmethod
    def suits(policy: Any) -> bool:
        """Whether the copy would be the policy: plain LoRA on linear layers, on a CPU with oneDNN. All weights are in
        float32; or in bfloat16, frozen, and of linear layers, embeddings and norms, where the CPU computes in it."""
        from peft import PeftModel

        if not isinstance(policy, PeftModel) or policy.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        base = [parameter for name, parameter in policy.named_parameters() if "lora_" not in name]
        adapted = [module for module in policy.modules() if hasattr(module, "get_delta_weight")]
        exact = all(parameter.dtype == torch.float32 for parameter in base)
        return (exact or _is_rounded(base)) and bool(adapted) and all(map(_is_plain, adapted))

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def refresh(self) -> None:
        """Take in the policy's active adapters as they are now."""
        for module, packed in self._adapted:
            names = [name for name in module.active_adapters if name in module.lora_A]
            if self._merges:
                packed.fill(sum(map(module.get_delta_weight, names), module.get_base_layer().weight))
            else:
                packed.updates = [_factors(module, name) for name in names]


def _other_products(base: nn.Module, adapted: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers without an adapter, but for the head: it is float32, as in scoring."""
    below, head = tuple(f"{name}." for name in adapted), base.get_output_embeddings()
    linears = ((name, module) for name, module in base.named_modules() if type(module) is nn.Linear)
    return {name: module for name, module in linears if module is not head and not name.startswith(below)}


def _shared(base: nn.Module, products: dict[str, nn.Linear]) -> dict[int, Tensor]:
    """What ``copy.deepcopy`` takes for each tensor: itself, or its float32 where no product is made with it."""
    multiplied = {id(linear.weight) for linear in products.values()}
    tensors = (*base.parameters(), *base.buffers())
    return {id(tensor): tensor if id(tensor) in multiplied else _widened(tensor) for tensor in tensors}


def _widened(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.bfloat16:
        return tensor
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _packed(linear: nn.Linear) -> PackedLinear:
    packed = PackedLinear(linear)
    packed.fill(linear.weight.detach())
    return packed


def _is_rounded(parameters: Iterable[nn.Parameter]) -> bool:
    frozen = all(each.dtype == torch.bfloat16 and each.ndim < 3 and not each.requires_grad for each in parameters)
    return frozen and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _factors(module: Any, name: str) -> tuple[Tensor, Tensor]:
    """(in, r) and (r, out) of a layer's adapter, scaled."""
    down, up = module.lora_A[name].weight.float(), module.lora_B[name].weight.float() * module.scaling[name]
    return down.T.contiguous(), up.T.contiguous()


def _is_plain(module: Any) -> bool:
    """LoRA and nothing else: no DoRA or other variant, no bias in the update."""
    from peft.tuners.lora import Linear

    plain = type(module) is Linear and type(module.get_base_layer()) is nn.Linear
    return plain and not module.lora_variant and not any(module.lora_bias.values())
