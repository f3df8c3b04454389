"""A cache of ``transformers`` that is told where to write: what the exported programs keep of a text.

Imported where it is used, since it needs ``transformers``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_passes.errors import CaptureError

# Room enough for the two tokens of the run that shows how wide each layer is.
_FEW_TOKENS = 4


class PositionedLayer(StaticLayer):
    """Keys and values of one layer, ``(batch, heads, max_length, head_dim)``, written at ``positions`` ``(1, tokens)``.

    Nothing here counts tokens. A sliding window is kept in full, and the mask hides what lies outside it:
    so a token stays where it was written, whatever comes after.
    """

    def __init__(self, like: Any, batch: int, max_length: int) -> None:
        super().__init__(max_cache_len=max_length)
        self.keys, self.values = (
            torch.zeros(batch, one.shape[1], max_length, one.shape[-1], dtype=one.dtype, device=one.device)
            for one in (like.keys, like.values)
        )
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True
        self.positions = torch.zeros(1, 1, dtype=torch.long, device=self.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write keys and values of new tokens, and return those of all."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.positions[0], key_states)
        self.values.index_copy_(2, self.positions[0], value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Return how many tokens came before, as a tensor: a number would end up in the program."""
        return self.positions[0, 0]


def make_cache(model: Any, batch: int, max_length: int) -> StaticCache:
    """Return a cache for ``model``, allocated and zero. What its layers hold is read off a run on two tokens.

    :class:`CaptureError` where a layer keeps something else than keys and values of attention.
    """
    cache = StaticCache(config=model.config, max_cache_len=_FEW_TOKENS)
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    model(ids, use_cache=True, **cache_argument(model, cache))
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", layer) is None and not hasattr(layer, "conv_states"):
            continue  # it reads the keys and values of another layer, or none
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            raise CaptureError(
                f"layer {index} of {type(model).__name__} keeps its state in a {type(layer).__name__}; "
                "export handles keys and values of attention only"
            )
        cache.layers[index] = PositionedLayer(layer, batch, max_length)
    return cache


def tell_positions(cache: StaticCache, positions: torch.Tensor) -> None:
    """Let the next tokens be written at ``positions`` ``(1, tokens)``."""
    for layer in cache.layers:
        if isinstance(layer, PositionedLayer):
            layer.positions = positions


def cache_tensors(cache: StaticCache) -> dict[str, torch.Tensor]:
    """Return the tensors of a cache by the names that ExecuTorch's exports give them: ``key_cache_0``, ..."""
    return {
        f"{kind}_cache_{index}": tensor
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, PositionedLayer)
        for kind, tensor in (("key", layer.keys), ("value", layer.values))
        if tensor is not None
    }
