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

import ast
from collections.abc import Mapping
from typing import Any

import sympy
from torch.utils._sympy import functions as shape_functions

from adaskip_passes.errors import DamagedFileError

__all__ = ["from_text", "from_tree", "to_tree"]

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
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "Add",
    ast.Mult: "Mul",
    ast.Pow: "Pow",
    ast.FloorDiv: "FloorDiv",
    ast.Mod: "Mod",
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


def from_text(text: str, symbols: Mapping[str, Any]) -> Any:
    """Return the expression whose ``str`` is ``text``: numbers, symbols, operators and calls of functions of shapes.

    Raises:
        DamagedFileError: It is something else, or names a symbol or a function that is unknown. Nothing is run.

    >>> q = sympy.Symbol("q")
    >>> from_text("3*q**2 - q/2 + Max(1, q)", {"q": q})
    3*q**2 - q/2 + Max(1, q)
    """
    try:
        return from_tree(_tree(ast.parse(text, mode="eval").body), symbols)
    except DamagedFileError:
        raise
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{text!r} is no expression in {', '.join(symbols)}") from error


def _tree(node: ast.expr) -> Any:
    """Return a parsed expression as :func:`to_tree` writes it."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return ["Mul", -1, _tree(node.operand)]
    if isinstance(node, ast.BinOp):
        left, right = _tree(node.left), _tree(node.right)
        if isinstance(node.op, ast.Sub):
            return ["Add", left, ["Mul", -1, right]]
        if isinstance(node.op, ast.Div):
            return ["Mul", left, ["Pow", right, -1]]
        if isinstance(node.op, ast.Pow) and not _is_small(node.right):
            raise ValueError("a power of more than 16 takes forever to compute")
        if type(node.op) in _OPERATORS:
            return [_OPERATORS[type(node.op)], left, right]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return [node.func.id, *map(_tree, node.args)]
    raise ValueError(f"{ast.dump(node)} is no part of an expression")


def _is_small(exponent: ast.expr) -> bool:
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    return isinstance(exponent, ast.Constant) and isinstance(exponent.value, int) and exponent.value <= 16


def _function(name: str) -> Any:
    if name in _SHAPES:
        return getattr(shape_functions, name)
    if name in _SYMPY:
        return getattr(sympy, name)
    if name in _RELATIONS:
        return _RELATIONS[name]
    raise DamagedFileError(f"an expression calls {name!r}, which is no function of shapes")
