"""Attention masks that allow what causality allows anyway, taken out so that the kernels for causal attention run.

Where a model is told of no padding it may still compute a mask, because while it is captured it cannot look at one::

    %m = le(%keys_at, %queries_at)             bool[1, 1, q, k]
    %k = reshape(expand(%k0, ...))             each head of keys as often as queries share it
    %o = sdpa(%q, %k, %v, attn_mask=%m)        %o = sdpa(%q, %k0, %v0, is_causal=True, enable_gqa=True)

With a mask, half of the products are computed to be thrown away, and on a GPU every key is copied for each head of
queries that shares it. What a mask allows is worked out symbolically, for one query and one key at any position, so the
mask goes only where it is proven to say what takes its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.effects import Effects, find_effects, op_name
from adaskip_passes.graph import call, fake_tensor, fake_value, named_arguments, size_expression

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_ROW, _HEAD, _QUERY, _KEY = sympy.symbols("row head query key", integer=True, nonnegative=True)
# From the differences of both sides: what has to be zero or more.
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "le": lambda a, b: b - a,
    "lt": lambda a, b: b - a - 1,
    "ge": lambda a, b: a - b,
    "gt": lambda a, b: a - b - 1,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "sub": operator.sub}
_SAME_VALUES = frozenset({"to", "bool", "contiguous", "clone", "long", "int"})
# Wider heads have no kernel that takes groups.
_WIDEST = 256


def drop_implied_masks(gm: fx.GraphModule) -> int:
    """Rewrite the attentions of ``gm`` whose masks say no more than causality, in place; return how many there were."""
    calls = gm.graph.find_nodes(op="call_function", target=torch.nn.functional.scaled_dot_product_attention)
    masked = [node for node in calls if fake_tensor(named_arguments(node, _NAMES).get("attn_mask")) is not None]
    if not masked:
        return 0
    effects = find_effects(gm)
    reader = _MaskReader(effects)
    found = [(node, rule) for node in masked if (rule := _rule(node, reader)) is not None]
    for node, rule in found:
        _rewrite(gm.graph, node, rule, effects)
    if found:
        gm.graph.lint()
        gm.recompile()
    return len(found)


@dataclass(frozen=True)
class _Rule:
    """What takes the place of a mask: nothing, or that no query looks at a later key. ``longer``: there are more keys than queries."""

    causal: bool
    longer: bool


class _UnknownError(Exception):
    """A mask is computed in a way that is not understood here."""


def _rule(node: fx.Node, reader: _MaskReader) -> _Rule | None:
    given = named_arguments(node, _NAMES)
    q, k, mask = (fake_tensor(given.get(name)) for name in ("query", "key", "attn_mask"))
    if q is None or k is None or mask is None or given.get("is_causal") or mask.dtype != torch.bool:
        return None
    if q.dim() != 4 or k.dim() != 4 or mask.dim() != 4:
        return None
    queries, keys = size_expression(q.shape[-2]), size_expression(k.shape[-2])
    try:
        conditions = reader.conditions(given["attn_mask"], (_ROW, _HEAD, _QUERY, _KEY))
    except _UnknownError:
        return None
    left = [one for one in conditions if not _always(one, queries, keys)]
    if any(sympy.expand(one - (_QUERY - _KEY)) != 0 for one in left):
        return None
    return _Rule(bool(left), bool(left) and sympy.expand(queries - keys) != 0)


def _always(condition: sympy.Expr, queries: sympy.Expr, keys: sympy.Expr) -> bool:
    """Tell whether ``condition``, linear in query and key, is zero or more for all of them."""
    least = condition
    for symbol, size in ((_QUERY, queries), (_KEY, keys)):
        slope = sympy.diff(least, symbol)
        if not slope.is_Integer:
            return False
        least = least.subs(symbol, 0 if slope >= 0 else size - 1)
    return bool(sympy.expand(least).is_nonnegative)


class _MaskReader:
    """Works out single elements of masks, and of the integers that they are computed from, at symbolic places."""

    def __init__(self, effects: Effects) -> None:
        self._roots = effects.roots
        # What such memory holds depends on when it is read.
        self._written = {write.root for write in effects.writes}

    def conditions(self, node: Any, index: Sequence[sympy.Expr]) -> tuple[sympy.Expr, ...]:
        """Return what has to be zero or more for the element at ``index`` of the boolean tensor ``node`` to be true."""
        value = fake_tensor(node)
        if value is None or value.dtype != torch.bool:
            raise _UnknownError
        name = self._operation(node)
        if name in _COMPARISONS:
            left, right = (self._number(operand, index) for operand in _two(node))
            return (_COMPARISONS[name](left, right),)
        if name in ("and", "bitwise_and", "logical_and"):
            return tuple(one for operand in _two(node) for one in self.conditions(operand, _broadcast(operand, index)))
        if name in ("new_ones", "ones"):
            return ()
        return self.conditions(*_moved(node, name, index))

    def _number(self, node: Any, index: Sequence[sympy.Expr]) -> sympy.Expr:
        """Return the element at ``index``, as far as it has dimensions, of the integer tensor ``node``; a size is one too."""
        if isinstance(node, int):
            return sympy.Integer(node)
        value = fake_value(node) if isinstance(node, fx.Node) else None
        if isinstance(value, (int, torch.SymInt)):
            return size_expression(value)
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            raise _UnknownError
        name = self._operation(node)
        index = _broadcast(node, index)
        if name == "arange":
            return self._arange(node, index[0])
        if name in _ARITHMETIC:
            left, right = (self._number(operand, index) for operand in _two(node))
            return _ARITHMETIC[name](left, right)
        return self._number(*_moved(node, name, index))

    def _arange(self, node: fx.Node, at: sympy.Expr) -> sympy.Expr:
        numbers = [self._number(one, ()) for one in node.args]
        if len(numbers) not in (1, 2) or node.kwargs.keys() - {"device", "dtype"}:
            raise _UnknownError
        return at if len(numbers) == 1 else numbers[0] + at

    def _operation(self, node: fx.Node) -> str:
        if node.op not in ("call_function", "call_method") or self._roots[node] in self._written:
            raise _UnknownError
        return op_name(node).strip("_")


def _two(node: fx.Node) -> tuple[Any, Any]:
    if len(node.args) != 2 or node.kwargs:
        raise _UnknownError
    return node.args


def _moved(node: fx.Node, name: str, index: Sequence[sympy.Expr]) -> tuple[Any, Sequence[sympy.Expr]]:
    """Return of which tensor, and where in it, the element at ``index`` of the view or copy ``node`` is."""
    source, *others = node.args or (None,)
    if name in _SAME_VALUES:
        return source, index
    if name == "expand":
        return source, _broadcast(source, index)
    if name == "unsqueeze" and others and isinstance(others[0], int):
        dim = others[0] % len(index)
        return source, (*index[:dim], *index[dim + 1 :])
    if name == "getitem":
        items = others[0] if isinstance(others[0], tuple) else (others[0],)
        if all(item is None or item == slice(None) for item in items):
            kept = [at for item, at in zip(items, index, strict=False) if item is not None]
            return source, (*kept, *index[len(items) :])
    raise _UnknownError


def _broadcast(node: Any, index: Sequence[sympy.Expr]) -> Sequence[sympy.Expr]:
    """Return where in ``node`` the element is that broadcasting brings to ``index``."""
    value = fake_tensor(node)
    if value is None:
        return index
    behind = index[len(index) - value.dim() :] if value.dim() else ()
    if len(behind) != value.dim():
        raise _UnknownError
    return tuple(
        sympy.Integer(0) if isinstance(size, int) and size == 1 else at
        for size, at in zip(value.shape, behind, strict=True)
    )


def _rewrite(graph: fx.Graph, node: fx.Node, rule: _Rule, effects: Effects) -> None:
    given = named_arguments(node, _NAMES)
    before = [given["key"], given["value"], given["attn_mask"]]
    shared = [_repeated(one, node, effects) for one in before[:2]]
    if all(one is not None for one in shared) and _takes_groups(*map(fake_tensor, shared)):
        given |= {"key": shared[0], "value": shared[1], "enable_gqa": True}
    if rule.longer:
        with graph.inserting_before(node):
            length = call(graph, "size", given["query"], -2)
            for name in ("key", "value"):
                seen = (slice(None), slice(None), slice(None, length))
                given[name] = call(graph, operator.getitem, given[name], seen)
    given |= {"attn_mask": None, "is_causal": rule.causal}
    node.args = tuple(given.pop(name) for name in _NAMES[:3])
    node.kwargs = given
    _erase_unused(graph, before, effects)


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
