"""Attention within a window of positions, in time and memory that grow with the window and not with the prompt.

Kernels for attention take such a window as a mask of all queries by all keys, and multiply what it hides as well. Here
queries go block by block, each with the keys that one of its queries may look at. A window of all keys is causal attention.

The first keys may stay in sight of all, for a model leans on them whatever they say (attention sinks; Xiao et al.,
StreamingLLM, arXiv 2309.17453), and the last queries may see every key before them.

PyTorch's kernel for the CPU multiplies by the same library as ``linear``. Where oneDNN is the faster one
(:mod:`adaskip_passes.kernels.onednn`), a block of queries is attended to by two of its products and a softmax between.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import fx
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
    schema="(Tensor query, Tensor key, Tensor value, SymInt first, int window, float? scale, int sinks=0, int tail=0) -> Tensor",
)
def banded_attention(query, key, value, first, window, scale, sinks=0, tail=0):  # type: ignore[no-untyped-def]
    """Return the attention of ``query`` in which a query at q sees the keys at k with ``first <= q - k < first + window``.

    Of those that lie further behind, it sees the first ``sinks`` keys of all; the last ``tail`` queries see every one.

    Args:
        query: ``(batch, heads, queries, head_dim)``.
        key: ``(batch, groups, keys, head_dim)``; each of the groups serves ``heads // groups`` heads.
        value: ``(batch, groups, keys, value_dim)``.
        first: How far behind a query its first key lies; 0 where it sees itself.
        window: How many keys it sees at most.
        scale: Of the products, ``head_dim ** -0.5`` where it is None.
        sinks: How many first keys no window hides.
        tail: How many last queries have no window.

    Returns:
        ``(batch, heads, queries, value_dim)``, zero for a query that sees no key.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _, heads, queries, width = query.shape
    many = query.device.type == "cpu" and query.dtype == torch.float32 and queries >= _MANY
    if many and onednn.enabled() and onednn_pays(torch.get_num_threads(), heads, key.shape[1], width):
        return _by_products(query, key, value, first, window, scale, sinks, tail)
    return _by_kernel(query, key, value, first, window, scale, sinks, tail)


# What graphs call, and the window that hides nothing.
BANDED_ATTENTION = torch.ops.adaskip.banded_attention.default
ALL_KEYS = sys.maxsize


@dataclass(frozen=True)
class Band:
    """What a node that calls :func:`banded_attention` is given."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    first: fx.Node | int
    window: int
    scale: float | None
    sinks: int = 0
    tail: int = 0


def band_of(node: fx.Node) -> Band:
    """Return what ``node``, a call of :data:`BANDED_ATTENTION`, is given."""
    return Band(*node.args, **node.kwargs)  # type: ignore[arg-type]


@banded_attention.register_fake
def _(query, key, value, first, window, scale, sinks=0, tail=0):  # type: ignore[no-untyped-def]
    return _like(query, value)


@cache
def onednn_pays(threads: int, heads: int, groups: int, width: int) -> bool:
    """Return whether causal attention is clearly faster here by products of oneDNN; tried once, in some 0.1 s."""
    query, key = onednn.operand(1, heads, _MANY, width), onednn.operand(1, groups, _MANY, width)
    name = f"attention of {heads} heads with {threads} threads"
    return onednn.pays(name, _by_kernel, _by_products, query, key, key, 0, _MANY, width**-0.5)


@dataclass(frozen=True)
class _Block:
    """The queries from ``start`` to before ``stop``, and the keys that one of them sees.

    These are the first ``sinks``, and those from ``oldest`` to before ``newest``; a window of its queries ends ``window``
    keys behind the nearest.
    """

    start: int
    stop: int
    oldest: int
    newest: int
    window: int
    sinks: int

    @property
    def asking(self) -> slice:
        """Which queries."""
        return slice(self.start, self.stop)

    def seen(self, one: torch.Tensor) -> torch.Tensor:
        """Return those of keys, values or positions that a query sees, along the last dimension but one."""
        near = one[..., self.oldest : self.newest, :]
        return torch.cat([one[..., : self.sinks, :], near], -2) if self.sinks else near


def _blocks(queries: int, keys: int, first: int, window: int, size: int, sinks: int, tail: int) -> Iterator[_Block]:
    body = max(0, queries - tail)
    for begin, end, width in ((0, body, window), (body, queries, max(queries, keys) + abs(first))):
        for start in range(begin, end, size):
            stop = min(start + size, end)
            oldest, newest = max(0, start - first - width + 1), min(keys, stop - first)
            first_keys = min(sinks, max(0, newest))
            if first_keys >= oldest:  # the first keys and those of the window are one row
                first_keys, oldest = 0, 0 if first_keys else oldest
            yield _Block(start, stop, oldest, newest, width, first_keys)


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: int,
    window: int,
    scale: float,
    sinks: int = 0,
    tail: int = 0,
) -> torch.Tensor:
    queries, keys = query.shape[-2], key.shape[-2]
    grouped = query.shape[1] != key.shape[1]
    if first == 0 and queries <= min(window, keys):
        nearest = key[:, :, :queries], value[:, :, :queries]
        return _laid_out(
            functional.scaled_dot_product_attention(query, *nearest, is_causal=True, scale=scale, enable_gqa=grouped)
        )
    result = _like(query, value)
    at = torch.arange(max(queries, keys), device=query.device)[:, None]
    for block in _blocks(queries, keys, first, window, _BLOCK, sinks, tail):
        if block.newest <= block.oldest and not block.sinks:
            result[:, :, block.asking] = 0
            continue
        seen = block.seen(at[:keys]).T
        behind = at[block.asking] - seen
        mask = (behind >= first) & ((behind < first + block.window) | (seen < sinks))
        result[:, :, block.asking] = functional.scaled_dot_product_attention(
            query[:, :, block.asking],
            block.seen(key),
            block.seen(value),
            attn_mask=mask,
            scale=scale,
            enable_gqa=grouped,
        )
    return result


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: int,
    window: int,
    scale: float,
    sinks: int = 0,
    tail: int = 0,
) -> torch.Tensor:
    (batch, heads, queries, width), (groups, keys) = query.shape, key.shape[1:3]
    each = heads // groups
    result = _like(query, value)
    query = query * scale
    columns = value.transpose(2, 3).contiguous()  # (batch, groups, value_dim, keys), as a product wants its weights
    at = torch.arange(max(queries, keys), device=query.device)[:, None]
    size = _block_for_products(each, min(keys, window))
    for block in _blocks(queries, keys, first, window, size, sinks, tail):
        if block.newest <= block.oldest and not block.sinks:
            result[:, :, block.asking] = 0
            continue
        seen = block.seen(at[:keys]).T
        behind = at[block.asking] - seen
        # From the first to before the last of the keys of the window, all queries of the block see all.
        before = max(0, block.stop - first - block.window - block.oldest) + block.sinks
        after = max(0, block.start - first + 1 - block.oldest) + block.sinks
        gone, late = behind[:, :before] >= first + block.window, behind[:, after:] < first
        gone &= seen[:, :before] >= sinks
        lonely = block.start < first or block.stop - first - block.window >= keys
        softmax = torch.ops.aten._safe_softmax.default if lonely else torch.softmax
        for row, group in itertools.product(range(batch), range(groups)):
            share = slice(group * each, (group + 1) * each)
            rows = query[row, share, block.asking].reshape(-1, width)
            scores = onednn.multiply(rows, block.seen(key[row, group])).view(each, -1, seen.shape[-1])
            scores[..., :before].masked_fill_(gone, float("-inf"))
            scores[..., after:].masked_fill_(late, float("-inf"))
            weights = columns[row, group]
            mixed = onednn.multiply(softmax(scores, -1).flatten(0, 1), block.seen(weights.T).T)
            result[row, share, block.asking] = mixed.view(each, block.stop - block.start, -1)
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
