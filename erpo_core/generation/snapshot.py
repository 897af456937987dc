"""A float32 copy of a LoRA policy with the update inside the weights, to sample from on a CPU.

Decoding reads every weight for a handful of rows, so what counts is memory traffic and the number of small products.
The policy itself is never merged: its base weights are the reference. Weights without an adapter are shared with it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

_FEW_ROWS = 64
"""Up to here W x^T is faster than x W^T: the weights are streamed once, in their own order."""
_ODD_ROWS, _EVEN_ROWS = 6, 16
"""Beyond the first the product wants a multiple of the second: 9 rows take half as long again as 16."""


class StreamedLinear(nn.Module):
    """``nn.Linear`` for few rows. Its weight is a plain tensor that somebody else fills."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, states: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = states.reshape(-1, states.shape[-1])
        if len(rows) > _FEW_ROWS:
            return nn.functional.linear(states, self.weight, self.bias)
        width = len(rows) if len(rows) <= _ODD_ROWS else -(-len(rows) // _EVEN_ROWS) * _EVEN_ROWS
        padded = rows if width == len(rows) else nn.functional.pad(rows, (0, 0, 0, width - len(rows)))
        out = torch.mm(self.weight, padded.T)[:, : len(rows)].T.contiguous()
        if self.bias is not None:
            out = out + self.bias
        return out.view(*states.shape[:-1], -1)


class PolicySnapshot:
    """The policy as it is at the last :meth:`refresh`."""

    def __init__(self, policy: Any) -> None:
        base = policy.get_base_model()
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.model = copy.deepcopy(base, shared).eval()
        for module in self.model.modules():
            # What TRL or accelerate put over a method still calls the module that was copied.
            module.__dict__.pop("forward", None)
        self._adapted: list[tuple[Any, StreamedLinear]] = []
        for name, module in base.named_modules():
            if hasattr(module, "get_delta_weight"):
                plain = module.get_base_layer()
                self._adapted.append((module, StreamedLinear(torch.empty_like(plain.weight), plain.bias)))
                self.model.set_submodule(name, self._adapted[-1][1])
        head = base.get_output_embeddings()
        if type(head) is nn.Linear:
            self.model.set_output_embeddings(StreamedLinear(head.weight, head.bias))

    @staticmethod
    def suits(policy: Any) -> bool:
        """Whether the copy would be the policy: plain LoRA on linear layers, all in float32, on a CPU."""
        from peft import PeftModel

        if not isinstance(policy, PeftModel) or policy.device.type != "cpu":
            return False
        if any(parameter.dtype != torch.float32 for parameter in policy.parameters()):
            return False
        adapted = [module for module in policy.modules() if hasattr(module, "get_delta_weight")]
        return bool(adapted) and all(map(_is_plain, adapted))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take in the policy's active adapters as they are now."""
        for module, linear in self._adapted:
            linear.weight.copy_(module.get_base_layer().weight)
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    linear.weight += module.get_delta_weight(adapter)


def _is_plain(module: Any) -> bool:
    """LoRA and nothing else: no DoRA or other variant, no bias in the update."""
    from peft.tuners.lora import Linear

    return type(module) is Linear and not module.lora_variant and not any(module.lora_bias.values())
