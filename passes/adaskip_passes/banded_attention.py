"""Attention within a window of positions, in time and memory that grow with the window and not with the prompt.

Kernels for attention take such a window as a mask of all queries by all keys, and multiply what it hides as well. Here
queries go block by block, each with the keys that one of its queries may look at.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# Fewer queries read each key more often, and more of them multiply more that is hidden.
_BLOCK = 128


@torch.library.custom_op(
    "adaskip::banded_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, SymInt first, int window, float? scale) -> Tensor",
)
def banded_attention(query, key, value, first, window, scale):  # type: ignore[no-untyped-def]
    """Return the attention of ``query`` in which a query at q sees the keys at k with ``first <= q - k < first + window``.

    Args:
        query: ``(batch, heads, queries, head_dim)``.
        key: ``(batch, groups, keys, head_dim)``; each of the groups serves ``heads // groups`` heads.
        value: ``(batch, groups, keys, head_dim)``.
        first: How far behind a query its first key lies; 0 where it sees itself.
        window: How many keys it sees at most.
        scale: Of the products, ``head_dim ** -0.5`` where it is None.

    Returns:
        ``(batch, heads, queries, head_dim)``, zero for a query that sees no key.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    how = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if first == 0 and queries <= min(window, keys):
        seen = key[:, :, :queries], value[:, :, :queries]
        return _laid_out(functional.scaled_dot_product_attention(query, *seen, is_causal=True, **how))
    result = _like(query)
    at = torch.arange(max(queries, keys), device=query.device)
    for start in range(0, queries, _BLOCK):
        stop = min(start + _BLOCK, queries)
        oldest, newest = max(0, start - first - window + 1), min(keys, stop - first)
        if newest <= oldest:
            result[:, :, start:stop] = 0
            continue
        behind = at[start:stop, None] - at[oldest:newest]
        mask = (behind >= first) & (behind < first + window)
        result[:, :, start:stop] = functional.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, oldest:newest], value[:, :, oldest:newest], attn_mask=mask, **how
        )
    return result


# What graphs call.
BANDED_ATTENTION = torch.ops.adaskip.banded_attention.default


@banded_attention.register_fake
def _(query, key, value, first, window, scale):  # type: ignore[no-untyped-def]
    return _like(query)


def _like(query: torch.Tensor) -> torch.Tensor:
    """Return open memory for the result, heads of a token side by side: the next product reads it so."""
    batch, heads, queries, width = query.shape
    return query.new_empty(batch, queries, heads, width).transpose(1, 2)


def _laid_out(result: torch.Tensor) -> torch.Tensor:
    return result.transpose(1, 2).contiguous().transpose(1, 2)
