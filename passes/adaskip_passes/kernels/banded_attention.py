"""Attention within a window of positions, in time and memory that grow with the window and not with the prompt.

Kernels for attention take such a window as a mask of all queries by all keys, and multiply what it hides as well. Here
queries go block by block, each with the keys that one of its queries may look at. A window of all keys is causal attention.

PyTorch's kernel for the CPU multiplies by the same library as ``linear``. Where oneDNN is the faster one
(:mod:`adaskip_passes.kernels.onednn`), a block of queries is attended to by two of its products and a softmax between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

from adaskip_passes.kernels import onednn

# Fewer queries read each key more often, and more of them multiply more that is hidden.
_BLOCK = 128
# As many rows, of all heads that share keys, make a product that is worth its call; with more scores than fit into a
# cache, it is slower than the kernel.
_ROWS, _FEWEST_ROWS, _SCORES = 256, 128, 6 << 20
# Shorter prompts have little to gain, and a trial takes as many.
_MANY = 1024


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
        value: ``(batch, groups, keys, value_dim)``.
        first: How far behind a query its first key lies; 0 where it sees itself.
        window: How many keys it sees at most.
        scale: Of the products, ``head_dim ** -0.5`` where it is None.

    Returns:
        ``(batch, heads, queries, value_dim)``, zero for a query that sees no key.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _, heads, queries, width = query.shape
    many = query.device.type == "cpu" and query.dtype == torch.float32 and queries >= _MANY
    if many and onednn.enabled() and onednn_pays(torch.get_num_threads(), heads, key.shape[1], width):
        return _by_products(query, key, value, first, window, scale)
    return _by_kernel(query, key, value, first, window, scale)


# What graphs call.
BANDED_ATTENTION = torch.ops.adaskip.banded_attention.default


@banded_attention.register_fake
def _(query, key, value, first, window, scale):  # type: ignore[no-untyped-def]
    return _like(query, value)


@cache
def onednn_pays(threads: int, heads: int, groups: int, width: int) -> bool:
    """Return whether causal attention is clearly faster here by products of oneDNN; tried once, in some 0.1 s."""
    query, key = onednn.operand(1, heads, _MANY, width), onednn.operand(1, groups, _MANY, width)
    name = f"attention of {heads} heads with {threads} threads"
    return onednn.pays(name, _by_kernel, _by_products, query, key, key, 0, _MANY, width**-0.5)


@dataclass(frozen=True)
class _Block:
    """The queries from ``start`` to before ``stop``, and the keys that one of them sees, ``oldest`` to before ``newest``."""

    start: int
    stop: int
    oldest: int
    newest: int


def _blocks(queries: int, keys: int, first: int, window: int, size: int) -> Iterator[_Block]:
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield _Block(start, stop, max(0, start - first - window + 1), min(keys, stop - first))


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, window: int, scale: float
) -> torch.Tensor:
    queries, keys = query.shape[-2], key.shape[-2]
    grouped = query.shape[1] != key.shape[1]
    if first == 0 and queries <= min(window, keys):
        seen = key[:, :, :queries], value[:, :, :queries]
        return _laid_out(
            functional.scaled_dot_product_attention(query, *seen, is_causal=True, scale=scale, enable_gqa=grouped)
        )
    result = _like(query, value)
    at = torch.arange(max(queries, keys), device=query.device)
    for block in _blocks(queries, keys, first, window, _BLOCK):
        asking, seen = slice(block.start, block.stop), slice(block.oldest, block.newest)
        if block.newest <= block.oldest:
            result[:, :, asking] = 0
            continue
        behind = at[asking, None] - at[seen]
        mask = (behind >= first) & (behind < first + window)
        result[:, :, asking] = functional.scaled_dot_product_attention(
            query[:, :, asking], key[:, :, seen], value[:, :, seen], attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    return result


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, window: int, scale: float
) -> torch.Tensor:
    (batch, heads, queries, width), (groups, keys) = query.shape, key.shape[1:3]
    each = heads // groups
    result = _like(query, value)
    query = query * scale
    columns = value.transpose(2, 3).contiguous()  # (batch, groups, value_dim, keys), as a product wants its weights
    at = torch.arange(max(queries, keys), device=query.device)
    for block in _blocks(queries, keys, first, window, _block_for_products(each, min(keys, window))):
        asking, seen = slice(block.start, block.stop), slice(block.oldest, block.newest)
        if block.newest <= block.oldest:
            result[:, :, asking] = 0
            continue
        behind = at[asking, None] - at[seen]
        # From the first to before the last of these keys, all queries of the block see all.
        before = max(0, block.stop - first - window - block.oldest)
        after = max(0, block.start - first + 1 - block.oldest)
        gone, late = behind[:, :before] >= first + window, behind[:, after:] < first
        lonely = block.start < first or block.stop - first - window >= keys
        softmax = torch.ops.aten._safe_softmax.default if lonely else torch.softmax
        for row, group in itertools.product(range(batch), range(groups)):
            share = slice(group * each, (group + 1) * each)
            rows = query[row, share, asking].reshape(-1, width)
            scores = onednn.multiply(rows, key[row, group, seen]).view(each, -1, block.newest - block.oldest)
            scores[..., :before].masked_fill_(gone, float("-inf"))
            scores[..., after:].masked_fill_(late, float("-inf"))
            mixed = onednn.multiply(softmax(scores, -1).flatten(0, 1), columns[row, group, :, seen])
            result[row, share, asking] = mixed.view(each, block.stop - block.start, -1)
    return result


def _block_for_products(each: int, seen: int) -> int:
    """Return how many queries to take at once where ``each`` heads share keys, and a query sees as many as ``seen``."""
    fitting = min(max(_BLOCK, _ROWS // each), _SCORES // (each * seen))
    return max(fitting, _FEWEST_ROWS // each, 1)


def _like(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return open memory for the result, heads of a token side by side: the next product reads it so."""
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)


def _laid_out(result: torch.Tensor) -> torch.Tensor:
    return result.transpose(1, 2).contiguous().transpose(1, 2)
