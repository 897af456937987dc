"""Decoding with tensors of one shape: on CUDA a token is one recorded graph, launched whole, instead of a thousand
kernels, each launched by Python.

The key-value cache holds free columns, which attention is told to leave out; the batch is made anew, and recorded
anew, where its columns are used up, or half of its answers have ended and it is large.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from erpo_core.generation.base import Sampling
from erpo_core.generation.cache import is_plain
from erpo_core.generation.drawing import draw, logps_of
from erpo_core.packing import attention, supports_packing

ATTENTION = "erpo_fixed"
CHUNK = 16
"""Tokens between two looks at which answers have ended."""
_ROOM = 256
"""Free columns of a new batch."""
SMALL = 64
"""Answers: fewer cost no less time, so that such a batch is not made anew when some have ended."""

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens drawn (B,), answers (B,) and step (1,), on the device, to the tokens that are taken (B,)."""


def suits(model: Any, cache: Any) -> bool:
    """Whether a model decodes here as it does elsewhere: plain causal attention, weights that are not quantized."""
    return is_plain(cache) and supports_packing(model.get_decoder()) and not getattr(model, "quantization_method", None)


class FixedBatch:
    """B answers that grow by a token at a time, each in its row, all in the same column of the cache."""

    def __init__(
        self,
        model: Any,
        layers: Iterable[tuple[Tensor, Tensor]],
        mask: Tensor,
        logits: Tensor,
        alive: Tensor,
        step: int,
    ) -> None:
        """
        Args:
            layers: Keys and values (B, heads, P, head size) of each layer, which are copied.
            mask: (B, P), 1 where a column holds a token of the row.
            logits: (B, V) of each row's next token.
            alive: (B,) int64: which answer a row is.
            step: Tokens that each answer has.
        """
        size, length = mask.shape
        columns = -(-(length + _ROOM) // 64) * 64
        device = mask.device
        self.alive = alive
        self.logits = logits.contiguous()
        self.left = columns - length
        self.chosen = torch.zeros(CHUNK, size, dtype=torch.long, device=device)
        self.logps = torch.zeros(CHUNK, size, device=device)
        self.uniform = torch.zeros(CHUNK, size, dtype=torch.float64, device=device)
        self._model, self._step = model, torch.tensor([step], device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._column = torch.tensor([length], device=device)
        self._positions = mask.sum(1, keepdim=True)
        self._cache = DynamicCache()
        self._cache.layers = [FixedLayer(*layer, columns, self._column) for layer in layers]
        hidden = torch.where(mask.bool(), 0.0, float("-inf")).to(self._cache.layers[0].dtype)
        self._bias = pad(hidden, (0, columns - length), value=float("-inf"))[:, None, None]
        self._graph: torch.cuda.CUDAGraph | None = None

    def selected(self, rows: Tensor) -> "FixedBatch":
        """These rows, (B',) int64, with room again."""
        length = int(self._column)
        layers = ((x.keys[rows, :, :length], x.values[rows, :, :length]) for x in self._cache.layers)
        mask = (self._bias[rows, 0, 0, :length] == 0).long()
        self._graph = None
        return FixedBatch(self._model, layers, mask, self.logits[rows], self.alive[rows], int(self._step))

    def advance(self, tokens: int, sampling: Sampling, choose: Choose) -> None:
        """The next ``tokens`` of each row, into ``chosen`` and ``logps`` from their first row on, by ``uniform``."""
        self._slot.zero_()
        self.left -= tokens
        for _ in range(tokens):
            if self._graph is not None:
                self._graph.replay()
                continue
            # Before a recording: kernels are loaded and libraries take their workspace.
            self._token(sampling, choose)
            if self.logits.is_cuda:
                self._graph = recorded(lambda: self._token(sampling, choose))

    def _token(self, sampling: Sampling, choose: Choose) -> None:
        uniform = self.uniform.index_select(0, self._slot)[0]
        chosen = choose(draw(self.logits, sampling, uniform), self.alive, self._step)
        self.chosen.index_copy_(0, self._slot, chosen[None])
        if sampling.is_whole:
            self.logps.index_copy_(0, self._slot, logps_of(self.logits, chosen, sampling.temperature)[None])
        self._bias.index_fill_(3, self._column, 0.0)
        with attention(self._model.config, ATTENTION), _uncached_autocast(self.logits.device.type):
            out = self._model(
                input_ids=chosen[:, None],
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                fixed_bias=self._bias,
            )
        self.logits.copy_(out.logits[:, -1])
        for counter in (self._slot, self._step, self._column, self._positions):
            counter += 1


class FixedLayer(DynamicLayer):
    """Keys and values in a tensor of ``columns``; the next token's go to ``column`` (1,), which its owner moves."""

    def __init__(self, keys: Tensor, values: Tensor, columns: int, column: Tensor) -> None:
        super().__init__()
        # Zeros: what attention leaves out is multiplied by 0, and must be a number.
        # Rotary embeddings may leave float32 keys under autocast; attention takes both in one dtype.
        states = (keys.to(values.dtype), values)
        self.keys, self.values = (pad(old, (0, 0, 0, columns - old.shape[2])) for old in states)
        self.dtype, self.device, self.is_initialized = values.dtype, values.device, True
        self._column = column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One token's (B, heads, 1, head size); all columns come back."""
        self.keys.index_copy_(2, self._column, key_states.to(self.dtype))
        self.values.index_copy_(2, self._column, value_states.to(self.dtype))
        return self.keys, self.values


def recorded(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """What ``run`` launches, as a graph; nothing of it is computed yet."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@contextmanager
def _uncached_autocast(device: str) -> Iterator[None]:
    """The autocast that is on, without its copies of weights: a graph would keep the address of a copy."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def _attend(module, query, key, value, attention_mask, *, fixed_bias: Tensor, scaling=None, **_):
    """transformers' attention interface: (B, heads, 1, head size) in, (B, 1, heads, head size) out."""
    # Heads that share keys are rows of one product: nothing is repeated.
    grouped = query.to(key.dtype).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    bias = fixed_bias.expand(-1, -1, grouped.shape[2], -1)
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scaling)
    return found.flatten(1, 2)[:, None], None


AttentionInterface.register(ATTENTION, _attend)
