"""A key-value cache that grows without being copied at every token."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Tokens of free space at least, where a layer must move; then as much again as it holds."""


class RoomyLayer(DynamicLayer):
    """transformers' DynamicLayer, with free space behind the keys and values: ``torch.cat`` copies all at each token.

    ``keys`` and ``values`` stay what the base class says, (B, heads, tokens, head size), as views of larger tensors;
    whoever replaces them (a selection of rows, a repetition) just makes the next token move once.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._held: tuple[Tensor, Tensor] | None = None
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises RuntimeError where a gradient is recorded: the space is written in place."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise RuntimeError("RoomyLayer: written in place, so it has no gradient; use DynamicCache")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        length = self.keys.shape[-2]
        total = length + key_states.shape[-2]
        if not self._has_room(total):
            self._move(total)
        keys, values = self._room
        keys[:, :, length:total] = key_states
        values[:, :, length:total] = value_states
        self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        self._held = self.keys, self.values
        return self.keys, self.values

    def _has_room(self, total: int) -> bool:
        if self._room is None or self._held is None:
            return False
        untouched = self.keys is self._held[0] and self.values is self._held[1]
        return untouched and total <= self._room[0].shape[-2]

    def _move(self, total: int) -> None:
        length = self.keys.shape[-2]
        room = []
        for old in (self.keys, self.values):
            new = old.new_empty(*old.shape[:2], total + max(_ROOM, length), old.shape[-1])
            new[:, :, :length] = old
            room.append(new)
        self._room = room[0], room[1]


def roomy_cache(config: Any) -> DynamicCache:
    """The model's own kind of cache, its plain layers with room; sliding-window and other layers stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_plain(cache: DynamicCache) -> bool:
    """Whether every layer just keeps its keys and values: no window, no state that goes from token to token."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)
