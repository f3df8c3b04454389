"""Attention masks that say no more than causality or a window does, taken out so that what is hidden is not computed.

Where a model is told of no padding it may still compute a mask, because while it is captured it cannot look at one::

    %m = le(%keys_at, %queries_at)             bool[1, 1, q, k]
    %k = reshape(expand(%k0, ...))             each head of keys as often as queries share it
    %o = sdpa(%q, %k, %v, attn_mask=%m)        %o = sdpa(%q, %k0, %v0, is_causal=True, enable_gqa=True)

With a mask, half of the products are computed to be thrown away, and on a GPU every key is copied for each head of
queries that shares it. A sliding window hides nearly all of a long prompt; on a CPU its attention becomes one within a band::

    %m = and(%m, gt(%keys_at, %queries_at - 512))
    %o = sdpa(%q, %k, %v, attn_mask=%m)        %o = banded_attention(%q, %k0, %v0, 0, 512, scale)

What a mask allows is worked out symbolically, for one query and one key at any position
(:mod:`adaskip_passes.analysis.masks`), so the mask goes only where it is proven to say what takes its place.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from adaskip_passes.analysis.effects import Effects, find_effects
from adaskip_passes.analysis.masks import HEAD, KEY, QUERY, ROW, MaskReader, UnknownMaskError
from adaskip_passes.ir.graph import (
    ATTENTION_ARGUMENTS,
    call,
    fake_tensor,
    fake_value,
    named_arguments,
    op_name,
    size_expression,
)
from adaskip_passes.ir.plain_tensors import is_plain
from adaskip_passes.kernels.banded_attention import Band
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream

# Wider heads have no kernel that takes groups.
_WIDEST = 256


@dataclass(frozen=True)
class SimplifyMasks:
    """Take out of attentions the masks that say no more than causality or a window."""

    name: ClassVar[str] = "simplify-masks"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place; it needs no stream."""
        calls = gm.graph.find_nodes(op="call_function", target=torch.nn.functional.scaled_dot_product_attention)
        masks = {node: named_arguments(node, ATTENTION_ARGUMENTS).get("attn_mask") for node in calls}
        masked = [node for node, mask in masks.items() if fake_tensor(mask) is not None]
        if not masked:
            return PassResult(stream, modified=False, matched=0)
        effects = find_effects(gm)
        reader = MaskReader(effects)
        found = [(node, rule) for node in masked if (rule := _rule(node, reader)) is not None]
        for node, rule in found:
            _rewrite(gm.graph, node, rule, effects)
        return PassResult(stream, bool(found), len(found))


@dataclass(frozen=True)
class _Causality:
    """What takes the place of a mask: nothing, or that no query looks at a later key. ``longer``: there are more keys than queries."""

    causal: bool
    longer: bool


@dataclass(frozen=True)
class _Band:
    """A mask hides all but the keys that lie ``first`` to ``first + window - 1`` tokens behind a query; ``first`` may be a node."""

    first: fx.Node | int
    window: int


def _rule(node: fx.Node, reader: MaskReader) -> _Causality | _Band | None:
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    q, k, mask = (fake_tensor(given.get(name)) for name in ("query", "key", "attn_mask"))
    if q is None or k is None or mask is None or given.get("is_causal") or mask.dtype != torch.bool:
        return None
    if q.dim() != 4 or k.dim() != 4 or mask.dim() != 4:
        return None
    queries, keys = size_expression(q.shape[-2]), size_expression(k.shape[-2])
    try:
        conditions = reader.conditions(given["attn_mask"], (ROW, HEAD, QUERY, KEY))
    except UnknownMaskError:
        return None
    left = {sympy.expand(one) for one in conditions if not _always(one, queries, keys)}
    if left <= {QUERY - KEY}:
        return _Causality(bool(left), bool(left) and sympy.expand(queries - keys) != 0)
    plain = not given.get("dropout_p") and isinstance(given.get("scale"), (float, type(None)))
    return _band(node, left) if plain and is_plain(q) and q.device.type == "cpu" and queries != 1 else None


def _band(node: fx.Node, left: AbstractSet[sympy.Expr]) -> _Band | None:
    """Return the band that the conditions ``left`` leave of the mask of ``node``: none before its first key, none behind its last."""
    first = [QUERY - KEY - one for one in left if sympy.diff(one, KEY) == -1]
    last = [QUERY - KEY + one for one in left if sympy.diff(one, KEY) == 1]
    if len(left) != 2 or not first or not last or {QUERY, KEY} & (first[0].free_symbols | last[0].free_symbols):
        return None
    window = sympy.expand(last[0] - first[0] + 1)
    start = _size_before(node, first[0])
    return _Band(start, int(window)) if window.is_Integer and window > 0 and start is not None else None


def _size_before(node: fx.Node, size: sympy.Expr) -> fx.Node | int | None:
    """Return ``size`` as a number or as what computes it before ``node``, or None where nothing does."""
    if size.is_Integer:
        return int(size)
    sizes = ((one, fake_value(one)) for one in node.graph.nodes if one < node)
    return next((one for one, value in sizes if isinstance(value, torch.SymInt) and value.node.expr == size), None)


def _always(condition: sympy.Expr, queries: sympy.Expr, keys: sympy.Expr) -> bool:
    """Tell whether ``condition``, linear in query and key, is zero or more for all of them."""
    least = condition
    for symbol, size in ((QUERY, queries), (KEY, keys)):
        slope = sympy.diff(least, symbol)
        if not slope.is_Integer:
            return False
        least = least.subs(symbol, 0 if slope >= 0 else size - 1)
    return bool(sympy.expand(least).is_nonnegative)


def _rewrite(graph: fx.Graph, node: fx.Node, rule: _Causality | _Band, effects: Effects) -> None:
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    before = [given["key"], given["value"], given["attn_mask"]]
    shared = [_repeated(one, node, effects) for one in before[:2]]
    if all(one is not None for one in shared) and _takes_groups(*map(fake_tensor, shared)):
        given |= {"key": shared[0], "value": shared[1], "enable_gqa": True}
    if isinstance(rule, _Band):
        query, key, value = (given[name] for name in ATTENTION_ARGUMENTS[:3])
        Band(query, key, value, rule.first, rule.window, given.get("scale")).write(node)
    else:
        _make_causal(graph, node, rule, given)
    _erase_unused(graph, before, effects)


def _make_causal(graph: fx.Graph, node: fx.Node, rule: _Causality, given: dict[str, Any]) -> None:
    if rule.longer:
        with graph.inserting_before(node):
            length = call(graph, "size", given["query"], -2)
            for name in ("key", "value"):
                seen = (slice(None), slice(None), slice(None, length))
                given[name] = call(graph, operator.getitem, given[name], seen)
    given |= {"attn_mask": None, "is_causal": rule.causal}
    node.args = tuple(given.pop(name) for name in ATTENTION_ARGUMENTS[:3])
    node.kwargs = given


def _repeated(node: fx.Node, reader: fx.Node, effects: Effects) -> fx.Node | None:
    """Return the keys or values ``(batch, groups, tokens, width)`` of which ``node`` repeats each group, or None."""
    value = fake_tensor(node)
    wide = node.args[0] if op_name(node) == "reshape" and node.args else None
    inner = wide.args[0] if isinstance(wide, fx.Node) and op_name(wide) == "expand" else None
    if value is None or not isinstance(inner, fx.Node) or not inner.args:
        return None
    source = inner.args[0]
    one, grouped, repeated = fake_tensor(source), fake_tensor(inner), fake_tensor(wide)
    if one is None or grouped is None or repeated is None or one.dim() != 4:
        return None
    batch, groups, *rest = one.shape
    times = repeated.shape[2] if repeated.dim() == 5 else 0
    inserted = op_name(inner) == "unsqueeze" or (op_name(inner) == "getitem" and _adds_third_dimension(inner.args[1]))
    shapes = (
        (grouped.shape, (batch, groups, 1, *rest)),
        (repeated.shape, (batch, groups, times, *rest)),
        (value.shape, (batch, groups * times, *rest)),
    )
    if not inserted or any(list(map(str, shape)) != list(map(str, wanted)) for shape, wanted in shapes):
        return None
    # Read where the attention is, and no longer where the copy was made: nothing may have written it between.
    root = effects.roots[source]  # type: ignore[index]
    writers = (write.node for write in effects.writes if write.root is root)
    return source if all(writer < wide or reader < writer for writer in writers) else None  # type: ignore[return-value]


def _adds_third_dimension(index: Any) -> bool:
    return isinstance(index, tuple) and index.index(None) == 2 and all(one in (None, slice(None)) for one in index)


def _takes_groups(key: torch.Tensor | None, value: torch.Tensor | None) -> bool:
    assert key is not None
    assert value is not None
    width = key.shape[-1]
    return key.device.type in ("cpu", "cuda") and width == value.shape[-1] and width <= _WIDEST


def _erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node], effects: Effects) -> None:
    """Erase ``nodes`` that nothing reads any more, and what only they read; inputs and writes stay."""
    written, gone = effects.written(), set[fx.Node]()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        kept = node.op not in ("call_function", "call_method") or node in written or node in effects.checks
        if kept or node.users or node in gone:
            continue
        sources = node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)
        waiting.extend(sources)
