"""Our products of a LoRA layer against those of vLLM's CPU build."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from erpo_core.generation.vllm_lora_cpu import PlainProducts

TOKENS, RANK, WIDTH, SIZES = 6, 4, 16, (8, 4)


@pytest.mark.parametrize("is_prefill", [False, True])
@pytest.mark.parametrize("adapters", [(1,) * TOKENS, (2,) * TOKENS, (1, 1, 2, 2, 1, 2), (0,) * TOKENS])
def test_a_layer_gives_what_vllms_own_gives(adapters, is_prefill):
    torch.manual_seed(0)
    downs = tuple(torch.randn(2, 1, RANK, WIDTH) for _ in SIZES)
    ups = tuple(torch.randn(2, 1, size, RANK) for size in SIZES)
    states, base = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, sum(SIZES))
    found = []
    for kind in (PunicaWrapperCPU, PlainProducts):
        wrapper = kind(max_num_batched_tokens=32, max_batches=8, device="cpu")
        mapping = LoRAMapping(index_mapping=adapters, prompt_mapping=adapters, is_prefill=is_prefill)
        wrapper.update_metadata(mapping, [1, 2], 2, 100)
        out, logits = base.clone(), base.clone()
        wrapper.add_lora_linear(out, states, downs, ups, 0.5, SIZES)
        wrapper.add_lora_logits(logits, states, downs[0], ups[0], 0.5)  # the head's rows are fewer than its padding
        found.append(torch.stack([out, logits]))
    assert wrapper._only == (adapters[0] - 1 if adapters[0] and len(set(adapters)) == 1 else None)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert not adapters[0] or all(not torch.equal(one, base) for one in found[1])
