"""Caches, prompts and greedy decoding, to run whole requests through the driver and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version

from adaskip_compile.kv_cache.cache_argument import cache_argument

CACHES = ("dynamic", "static")
# What the installed transformers calls the argument, for calls of functions that do not say it.
CACHE_NAME = "cache" if Version(metadata.version("transformers")) >= Version("5.24") else "past_key_values"


def make_cache(kind: str, model: Any, length: int = 96) -> Any:
    """Return an empty cache of ``transformers``: ``dynamic``, or ``static`` with room for ``length`` tokens."""
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


def left_padded(rows: Sequence[torch.Tensor], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask ``(len(rows), longest row)`` of 1-d token ids, shorter rows padded on their left."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int, *, cache: Any = None, **how: Any
) -> torch.Tensor:
    """Return the ``steps`` tokens ``(batch, steps)`` that greedy ``model.generate`` adds; ``how`` is handed on."""
    how |= cache_argument(model, cache) if cache is not None else {}
    lengths = {"max_new_tokens": steps, "min_new_tokens": steps}
    result = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **lengths, **how)
    return result[:, ids.shape[1] :]


@torch.no_grad()
def greedy_loop(
    call: Callable[..., Any], ids: torch.Tensor, mask: torch.Tensor, steps: int, *, cache: Any
) -> torch.Tensor:
    """Return what :func:`generate` does, by calling ``call`` in a loop written by hand."""
    chosen: list[torch.Tensor] = []
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        how = {"use_cache": True, CACHE_NAME: cache}
        result = call(input_ids=ids, attention_mask=mask, position_ids=positions, **how)
        ids = result.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        chosen.append(ids)
    return torch.cat(chosen, dim=1)
