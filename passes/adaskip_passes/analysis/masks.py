"""What a boolean attention mask allows, worked out symbolically for one query and one key at any position.

A mask is computed from positions by comparisons, and read back through views and copies to them::

    %m = and(le(%keys_at, %queries_at), gt(%keys_at, sub(%queries_at, 512)))
         query - key >= 0,  key - query + 511 >= 0
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.analysis.effects import Effects
from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name, size_expression

ROW, HEAD, QUERY, KEY = sympy.symbols("row head query key", integer=True, nonnegative=True)
# From the differences of both sides: what has to be zero or more.
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "le": lambda a, b: b - a,
    "lt": lambda a, b: b - a - 1,
    "ge": lambda a, b: a - b,
    "gt": lambda a, b: a - b - 1,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "sub": operator.sub}
_SAME_VALUES = frozenset({"to", "bool", "contiguous", "clone", "long", "int"})


class UnknownMaskError(Exception):
    """A mask is computed in a way that is not understood here."""


class MaskReader:
    """Works out single elements of masks, and of the integers that they are computed from, at symbolic places."""

    def __init__(self, effects: Effects) -> None:
        self._roots = effects.roots
        # What such memory holds depends on when it is read.
        self._written = {write.root for write in effects.writes}

    def conditions(self, node: Any, index: Sequence[sympy.Expr]) -> tuple[sympy.Expr, ...]:
        """Return what has to be zero or more for the element at ``index`` of the boolean tensor ``node`` to be true."""
        value = fake_tensor(node)
        if value is None or value.dtype != torch.bool:
            raise UnknownMaskError
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
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
            raise UnknownMaskError
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
            raise UnknownMaskError
        return at if len(numbers) == 1 else numbers[0] + at

    def _operation(self, node: fx.Node) -> str:
        if node.op not in ("call_function", "call_method") or self._roots[node] in self._written:
            raise UnknownMaskError
        return op_name(node).strip("_")


def _two(node: fx.Node) -> tuple[Any, Any]:
    if len(node.args) != 2 or node.kwargs:
        raise UnknownMaskError
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
    raise UnknownMaskError


def _broadcast(node: Any, index: Sequence[sympy.Expr]) -> Sequence[sympy.Expr]:
    """Return where in ``node`` the element is that broadcasting brings to ``index``."""
    value = fake_tensor(node)
    if value is None:
        return index
    behind = index[len(index) - value.dim() :] if value.dim() else ()
    if len(behind) != value.dim():
        raise UnknownMaskError
    return tuple(
        sympy.Integer(0) if isinstance(size, int) and size == 1 else at
        for size, at in zip(value.shape, behind, strict=True)
    )
