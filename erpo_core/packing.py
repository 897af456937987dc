"""Groups of answers as one row of tokens: no padding, and no token twice.

What all prompts begin with, each prompt, and each answer are segments of a tree. A segment attends to itself causally
and to all tokens of the segments above. Everything but attention is a function of one token, so the model's
layers see exactly L = distinct tokens; attention runs on buckets of segments of like length that hang from one parent.
On CUDA a short row is attended to as a whole, behind a mask: there the number of launches is what takes time.
"""

# L = packed tokens, S = segments of a bucket, T = their padded length, P = tokens above them

import logging
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from erpo_core.heads import distance
from erpo_core.prefill import shared_prefix

_log = logging.getLogger(__name__)

ATTENTION = "erpo_packed"
_LEAST_FILL = 0.75
"""A bucket's shortest segment over its longest: below it, padding costs more than another kernel call."""
_SHORT_ROW = {"cpu": 0, "cuda": 4096}
"""Tokens of a row whose attention is one product with a mask of L x L."""
_ROUNDING = 0.1
"""Of the length of hidden states: as far as bfloat16 may move them in a deep model."""
_NARROW = 3
_SPARSE = ("index_topk", "index_topk_blocks")
"""Of configurations whose attention chooses what it sees where rows are longer than those that are tried."""
_ALIGNED = 16
"""Elements: attention kernels take rows of a mask that begin at a multiple of it."""


@dataclass(frozen=True)
class Bucket:
    """Segments under one parent, padded to one length."""

    columns: Tensor
    """(S * T,) int64 places in the row; padding repeats a segment's last token and is never read back."""
    size: int
    """S."""
    above: Tensor | None
    """(P,) int64 places of the tokens above, None at the root."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def mask(self, window: int | None) -> Tensor | None:
        """(T, P + T) bool: all above, and causal among themselves; of both, those within ``window`` tokens. None at
        the root, where causal says it. Made once for all layers."""
        above, length = 0 if self.above is None else len(self.above), len(self.columns) // self.size
        window = None if window is None or window >= above + length else window
        if window not in self._masks and (above or window):
            mask = torch.ones(length, above + length, dtype=torch.bool, device=self.columns.device).tril(above)
            self._masks[window] = mask.triu(above - window + 1) if window else mask
        return self._masks.get(window)


@dataclass(frozen=True)
class PackedRow:
    """The row and its tree."""

    ids: Tensor
    """(1, L) int64."""
    positions: Tensor
    """(1, L) int64, distance from the beginning of the prompt."""
    buckets: tuple[Bucket, ...]
    order: Tensor
    """(L,) int64: where each token's attention output stands in that of all buckets."""
    sources: Tensor
    """(N,) int64: the token whose hidden state predicts each answer token, answer by answer."""
    segments: Tensor
    """(L,) int64: the segment of each token, in the order of the row."""
    above: Tensor
    """(segments, segments) bool: whether the second is the first, or lies above it."""
    _biases: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def is_short(self, device: torch.device) -> bool:
        """Whether all of it is attended to at once."""
        return self.ids.shape[1] <= _SHORT_ROW.get(device.type, 0)

    def bias(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """(L, L): 0 where a token (row) sees another (column), minus infinity elsewhere. Made once for all layers."""
        if (dtype, window) not in self._biases:
            length, back = self.ids.shape[1], self.positions.T - self.positions
            sees = self.above[self.segments[:, None], self.segments] & (back >= 0)
            if window is not None:
                sees &= back < window
            width = -(-length // _ALIGNED) * _ALIGNED
            bias = torch.full((length, width), float("-inf"), dtype=dtype, device=sees.device)[:, :length]
            self._biases[dtype, window] = bias.masked_fill_(sees, 0.0)
        return self._biases[dtype, window]


def pack(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device | str) -> PackedRow:
    """Pack N prompts and their answers, ``len(answers) // N`` adjacent ones each. Empty answers take no place.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("prompts: each must hold a token")
    per_prompt = len(answers) // len(prompts)
    shared = shared_prefix(prompts)
    builder = _Builder()
    root = builder.add(prompts[0][:shared], ()) if shared else ()
    stems = builder.add_all([prompt[shared:] for prompt in prompts], root)
    sources = []
    for index, stem in enumerate(stems):
        above = (*root, *stem)
        # The last token of an answer predicts nothing.
        own = [answer[:-1] for answer in answers[index * per_prompt : (index + 1) * per_prompt]]
        places = builder.add_all(own, above)
        for answer, columns in zip(answers[index * per_prompt : (index + 1) * per_prompt], places, strict=True):
            sources += [above[-1], *columns][: len(answer)]
    return builder.finish(sources, device)


class _Builder:
    def __init__(self) -> None:
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._segments: list[int] = []
        self._above: list[set[int]] = []
        self._buckets: list[tuple[list[range], tuple[int, ...]]] = []

    def add(self, tokens: Sequence[int], above: tuple[int, ...]) -> tuple[int, ...]:
        return self.add_all([tokens], above)[0]

    def add_all(self, segments: Sequence[Sequence[int]], above: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Places of segments that hang from ``above``."""
        places = []
        parents = {self._segments[place] for place in above}
        for tokens in segments:
            start = len(self._ids)
            self._segments += [len(self._above)] * len(tokens)
            self._above.append(parents | {len(self._above)})
            self._ids += tokens
            self._positions += range(len(above), len(above) + len(tokens))
            places.append(range(start, len(self._ids)))
        for together in of_like_length([columns for columns in places if columns]):
            self._buckets.append((together, above))
        return [tuple(columns) for columns in places]

    def finish(self, sources: list[int], device) -> PackedRow:
        order = torch.empty(len(self._ids), dtype=torch.long)
        buckets, written = [], 0
        for segments, above in self._buckets:
            length = max(map(len, segments))
            columns = torch.tensor([[*columns, *[columns[-1]] * (length - len(columns))] for columns in segments])
            for row, own in enumerate(segments):
                start = written + row * length
                order[own.start : own.stop] = torch.arange(start, start + len(own))
            written += columns.numel()
            buckets.append(
                Bucket(
                    columns.flatten().to(device),
                    len(segments),
                    torch.tensor(above).to(device) if above else None,
                )
            )
        above_SS = torch.zeros(len(self._above), len(self._above), dtype=torch.bool)
        for segment, seen in enumerate(self._above):
            above_SS[segment, list(seen)] = True
        return PackedRow(
            torch.tensor([self._ids]).to(device),
            torch.tensor([self._positions]).to(device),
            tuple(buckets),
            order.to(device),
            torch.tensor(sources, dtype=torch.long).to(device),
            torch.tensor(self._segments).to(device),
            above_SS.to(device),
        )


def of_like_length(rows: Sequence[Sized]) -> list[list[Sized]]:
    """The rows in batches that waste little where each is padded to its longest, long ones first."""
    found: list[list[Sized]] = []
    for row in sorted(rows, key=len, reverse=True):
        if found and len(row) >= _LEAST_FILL * len(found[-1][0]):
            found[-1].append(row)
        else:
            found.append([row])
    return found


def supports_packing(body: Any) -> bool:
    """Whether a model's body takes our attention: causal layers, sliding or not, behind transformers' attention
    interface.

    What a configuration does not say (a mask, a sink or a window that a model makes itself) is found out by a trial,
    once for each body: a model that is not the same packed is scored padded.
    """
    if "_packs" not in vars(body):
        with _narrowed(body):
            body._packs = _looks_plain(body) and _is_the_same_packed(body)
    return body._packs


@contextmanager
def _narrowed(body: Any) -> Iterator[None]:
    """Windows are of three tokens: the trial's rows do not reach the end of those that models have."""
    holders = [body.config, *body.modules()]
    wide = [(each, value) for each in holders if isinstance(value := vars(each).get("sliding_window"), int)]
    for holder, _ in wide:
        holder.sliding_window = _NARROW
    try:
        yield
    finally:
        for holder, value in wide:
            holder.sliding_window = value


def _looks_plain(body: Any) -> bool:
    known = {"full_attention", "sliding_attention"}.issuperset(getattr(body.config, "layer_types", None) or ())
    sparse = any(getattr(body.config, name, None) is not None for name in _SPARSE)
    return known and not sparse and bool(getattr(body, "_supports_attention_backend", False))


@torch.no_grad()
def _is_the_same_packed(body: Any) -> bool:
    """Rounding aside, that of bfloat16 included; another attention moves hidden states as far as they are long."""
    device = next(body.parameters()).device
    ids = [token % body.config.vocab_size for token in range(3, 103, 4)]
    prompts, answers = (ids[:5], ids[2:6]), (ids[6:10], ids[10:17], ids[17:19], ids[19:25])
    rows = [[*prompts[index // 2], *answer[:-1]] for index, answer in enumerate(answers)]
    states = [body(input_ids=torch.tensor([row], device=device), use_cache=False).last_hidden_state[0] for row in rows]
    wanted = torch.cat([each[-len(answer) :] for each, answer in zip(states, answers, strict=True)]).float()
    try:
        found = packed_hidden(body, pack(prompts, answers, device)).float()
    except (TypeError, RuntimeError) as error:
        _log.warning("%s is scored padded, not packed: %s", type(body).__name__, error)
        return False
    apart = distance(found, wanted)
    if not apart <= _ROUNDING:
        _log.warning(
            "%s is scored padded: packed, its states are %.2g of their length apart", type(body).__name__, apart
        )
    return apart <= _ROUNDING


def packed_hidden(body: Any, row: PackedRow) -> Tensor:
    """(N, H) hidden states that predict the answers' tokens, answer by answer."""
    with attention(body.config, ATTENTION):
        output = body(input_ids=row.ids, position_ids=row.positions, use_cache=False, packed_row=row)
    return output.last_hidden_state[0].index_select(0, row.sources)


@contextmanager
def attention(config: Any, implementation: str) -> Iterator[None]:
    """A model of this configuration attends in that way. So must a backward that computes layers again (gradient
    checkpointing)."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module, query, key, value, attention_mask, *, packed_row: PackedRow, scaling=None, sliding_window=None, **options
):
    """transformers' attention interface: (1, heads, L, head size) in, (1, L, heads, head size) out.

    Raises:
        TypeError: the scores are capped, or a sink is among them.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise TypeError(f"{type(module).__name__} attends with {name}")
    attend = _attend_whole if packed_row.is_short(query.device) else _attend_buckets
    return attend(query, key, value, packed_row, scaling, sliding_window), None


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling, window: int | None) -> Tensor:
    # Rotary embeddings may leave float32 under autocast. Kernels that take a mask take no heads that share keys.
    shared = query.shape[1] // key.shape[1]
    key, value = (states.to(value.dtype).repeat_interleave(shared, 1) for states in (key, value))
    bias = row.bias(value.dtype, window)[None, None]
    found = scaled_dot_product_attention(query.to(value.dtype), key, value, attn_mask=bias, scale=scaling)
    return found.transpose(1, 2)


def _attend_buckets(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling, window: int | None) -> Tensor:
    query_Lhd, key_Lhd, value_Lhd = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = []
    for bucket in row.buckets:
        mask = bucket.mask(window)
        found = scaled_dot_product_attention(
            _padded(query_Lhd, bucket),
            _with_above(key_Lhd, bucket),
            _with_above(value_Lhd, bucket),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, row.order)[None]


def _padded(states_Lhd: Tensor, bucket: Bucket) -> Tensor:
    """(S, heads, T, head size)."""
    return states_Lhd.index_select(0, bucket.columns).unflatten(0, (bucket.size, -1)).transpose(1, 2)


def _with_above(states_Lhd: Tensor, bucket: Bucket) -> Tensor:
    """(S, heads, P + T, head size)."""
    own = _padded(states_Lhd, bucket)
    if bucket.above is None:
        return own
    above = states_Lhd.index_select(0, bucket.above).transpose(0, 1)
    return torch.cat([above.expand(bucket.size, -1, -1, -1), own], 2)


AttentionInterface.register(ATTENTION, _attend)
