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
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from adaskip_passes.ir.graph import ATTENTION_ARGUMENTS, fake_tensor, named_arguments, op_name
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
        return _by_products(query, key, value, scale, _Reach(first, window, sinks, tail))
    return _by_kernel(query, key, value, scale, _Reach(first, window, sinks, tail))


# What graphs call, and the window that hides nothing.
BANDED_ATTENTION = torch.ops.adaskip.banded_attention.default
ALL_KEYS = sys.maxsize


@dataclass(frozen=True)
class Band:
    """What a call of :func:`banded_attention` is given."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    first: fx.Node | int
    window: int
    scale: float | None
    sinks: int = 0
    tail: int = 0

    def write(self, node: fx.Node) -> None:
        """Make ``node`` that call."""
        edges = (self.sinks, self.tail) if self.sinks or self.tail else ()
        node.target, node.kwargs = BANDED_ATTENTION, dict[str, Any]()
        node.args = (self.query, self.key, self.value, self.first, self.window, self.scale, *edges)


def band_of(node: fx.Node) -> Band:
    """Return what ``node``, a call of :data:`BANDED_ATTENTION`, is given."""
    return Band(*node.args, **node.kwargs)  # type: ignore[arg-type]


def causal_band(node: fx.Node) -> Band | None:
    """Return the band that ``node`` is, or that it could be: causal attention without a mask. None for any other node."""
    if node.target is BANDED_ATTENTION:
        return band_of(node)
    if op_name(node) != "scaled_dot_product_attention":
        return None
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    q, k, v = (fake_tensor(given.get(name)) for name in ATTENTION_ARGUMENTS[:3])
    if q is None or k is None or v is None or not q.dim() == k.dim() == v.dim() == 4:
        return None
    heads, groups = q.shape[1], k.shape[1]
    known = (
        given.get("is_causal") is True
        and given.get("attn_mask") is None
        and not given.get("dropout_p")
        and isinstance(given.get("scale"), (float, type(None)))
        and isinstance(heads, int)
        and groups == v.shape[1]
        and (heads == groups or (bool(given.get("enable_gqa")) and heads % groups == 0))
    )
    query, key, value = (given[name] for name in ATTENTION_ARGUMENTS[:3])
    return Band(query, key, value, 0, ALL_KEYS, given.get("scale")) if known else None


@banded_attention.register_fake
def _(query, key, value, first, window, scale, sinks=0, tail=0):  # type: ignore[no-untyped-def]
    return _like(query, value)


@cache
def onednn_pays(threads: int, heads: int, groups: int, width: int) -> bool:
    """Return whether causal attention is clearly faster here by products of oneDNN; tried once, in some 0.1 s."""
    query, key = onednn.operand(1, heads, _MANY, width), onednn.operand(1, groups, _MANY, width)
    name = f"attention of {heads} heads with {threads} threads"
    return onednn.pays(name, _by_kernel, _by_products, query, key, key, width**-0.5, _Reach(0, _MANY))


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


@dataclass(frozen=True)
class _Reach:
    """Which keys a query sees, as :func:`banded_attention` is told."""

    first: int
    window: int
    sinks: int = 0
    tail: int = 0

    def blocks(self, queries: int, keys: int, size: int) -> Iterator[_Block]:
        """Yield blocks of up to ``size`` queries, in order; those of the tail apart."""
        body = max(0, queries - self.tail)
        whole = max(queries, keys) + abs(self.first)
        for begin, end, width in ((0, body, self.window), (body, queries, whole)):
            for start in range(begin, end, size):
                stop = min(start + size, end)
                oldest, newest = max(0, start - self.first - width + 1), min(keys, stop - self.first)
                sinks = min(self.sinks, max(0, newest))
                if sinks >= oldest:  # the first keys and those of the window are one row
                    sinks, oldest = 0, 0 if sinks else oldest
                yield _Block(start, stop, oldest, newest, width, sinks)


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, reach: _Reach
) -> torch.Tensor:
    queries, keys = query.shape[-2], key.shape[-2]
    grouped = query.shape[1] != key.shape[1]
    if reach.first == 0 and queries <= min(reach.window, keys):
        nearest = key[:, :, :queries], value[:, :, :queries]
        return _laid_out(
            functional.scaled_dot_product_attention(query, *nearest, is_causal=True, scale=scale, enable_gqa=grouped)
        )
    result = _like(query, value)
    at = torch.arange(max(queries, keys), device=query.device)[:, None]
    for block in reach.blocks(queries, keys, _BLOCK):
        if block.newest <= block.oldest and not block.sinks:
            result[:, :, block.asking] = 0
            continue
        seen = block.seen(at[:keys]).T
        behind = at[block.asking] - seen
        mask = (behind >= reach.first) & ((behind < reach.first + block.window) | (seen < reach.sinks))
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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, reach: _Reach
) -> torch.Tensor:
    (batch, heads, queries, width), (groups, keys) = query.shape, key.shape[1:3]
    each = heads // groups
    result = _like(query, value)
    query = query * scale
    columns = value.transpose(2, 3).contiguous()  # (batch, groups, value_dim, keys), as a product wants its weights
    at = torch.arange(max(queries, keys), device=query.device)[:, None]
    first, size = reach.first, _block_for_products(each, min(keys, reach.window))
    for block in reach.blocks(queries, keys, size):
        if block.newest <= block.oldest and not block.sinks:
            result[:, :, block.asking] = 0
            continue
        seen = block.seen(at[:keys]).T
        behind = at[block.asking] - seen
        # From the first to before the last of the keys of the window, all queries of the block see all.
        before = max(0, block.stop - first - block.window - block.oldest) + block.sinks
        after = max(0, block.start - first + 1 - block.oldest) + block.sinks
        gone, late = behind[:, :before] >= first + block.window, behind[:, after:] < first
        gone &= seen[:, :before] >= reach.sinks
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


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, first, window, scale, sinks, tail = inputs
    ctx.save_for_backward(query, key, value)
    ctx.scale, ctx.reach = scale, _Reach(first, window, sinks, tail)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value = (one.detach().requires_grad_() for one in ctx.saved_tensors)
    with torch.enable_grad():
        result = _by_kernel(query, key, value, ctx.scale, ctx.reach)
    return (*torch.autograd.grad(result, (query, key, value), gradient), *[None] * 5)


# Tuning maps descends through attentions, block by block as they are computed.
banded_attention.register_autograd(_backward, setup_context=_remember)


def _like(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return open memory for the result, heads of a token side by side: the next product reads it so."""
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)


def _laid_out(result: torch.Tensor) -> torch.Tensor:
    return result.transpose(1, 2).contiguous().transpose(1, 2)
