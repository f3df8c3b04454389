"""Symbolic expressions as plain lists, to be kept in JSON and read back without running anything.

``2*q*(t - q)`` is ``["Mul", 2, "q", ["Add", "t", ["Mul", -1, "q"]]]``: a number, the name of a symbol, or a
list of a function's name and its arguments. The functions are those of sympy and of PyTorch's shapes.

>>> q, t = sympy.symbols("q t", integer=True, positive=True)
>>> to_tree(2 * q * t)
['Mul', 2, 'q', 't']
>>> from_tree(["Add", "t", ["Mul", -1, "q"]], {"q": q, "t": t})
-q + t
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from torch.utils._sympy import functions as shape_functions

from adaskip_passes.errors import DamagedFileError

__all__ = ["from_tree", "to_tree"]

_SYMPY = ("Rational", "Add", "Mul", "Pow", "floor", "ceiling", "Abs", "And", "Or", "Not")
_SHAPES = ("Max", "Min", *shape_functions.__all__)
_RELATIONS = {
    "Equality": sympy.Eq,
    "Unequality": sympy.Ne,
    "StrictLessThan": sympy.Lt,
    "LessThan": sympy.Le,
    "StrictGreaterThan": sympy.Gt,
    "GreaterThan": sympy.Ge,
}


def to_tree(expression: Any) -> Any:
    """Return ``expression`` as numbers, symbol names and lists. A fraction is ``["Rational", p, q]``."""
    if isinstance(expression, (bool, int, float)):
        return expression
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    if expression.is_Symbol:
        return expression.name
    if expression.is_Integer:
        return int(expression)
    if expression.is_Rational:
        return ["Rational", int(expression.p), int(expression.q)]
    if expression.is_Float:
        return float(expression)
    return [type(expression).__name__, *map(to_tree, expression.args)]


def from_tree(tree: Any, symbols: Mapping[str, Any]) -> Any:
    """Return the expression that :func:`to_tree` wrote; ``symbols`` gives the symbol of each name.

    Raises:
        DamagedFileError: It names a symbol or a function that is unknown.
    """
    if isinstance(tree, (bool, int, float)):
        return sympy.sympify(tree)
    if isinstance(tree, str):
        if tree not in symbols:
            raise DamagedFileError(f"an expression names the symbol {tree!r}, of which nothing is known")
        return symbols[tree]
    name, *arguments = tree
    return _function(name)(*(from_tree(argument, symbols) for argument in arguments))


def _function(name: str) -> Any:
    if name in _SHAPES:
        return getattr(shape_functions, name)
    if name in _SYMPY:
        return getattr(sympy, name)
    if name in _RELATIONS:
        return _RELATIONS[name]
    raise DamagedFileError(f"an expression calls {name!r}, which is no function of shapes")
