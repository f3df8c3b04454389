"""Caches, prompts and greedy decoding, to run whole requests through the driver and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

CACHES = ("dynamic", "static")


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


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int, **how: Any) -> torch.Tensor:
    """Return the ``steps`` tokens ``(batch, steps)`` that greedy ``model.generate`` adds; ``how`` is handed on."""
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
        result = call(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        ids = result.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        chosen.append(ids)
    return torch.cat(chosen, dim=1)
