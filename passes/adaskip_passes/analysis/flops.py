"""How many floating-point operations a node of a graph does, as an expression of its symbolic shapes.

Only products of matrices count, at two operations a multiply-add, as ``torch.utils.flop_counter`` counts:
everything else is bound by memory and costs bytes. Attention counts the whole rectangle of queries by
keys, masked or not, causal or not; within a band it counts the band.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.ir.graph import fake_tensor, op_name, size_expression
from adaskip_passes.kernels.banded_attention import band_of

__all__ = ["count_flops", "hidden_flops", "shape_of", "sizes_product"]

Shape = tuple[sympy.Expr, ...]


def shape_of(value: Any) -> Shape:
    """Return the sizes of a node or fake tensor as sympy expressions in the graph's symbols; ``()`` where it has none."""
    tensor = value if isinstance(value, torch.Tensor) else fake_tensor(value)
    if tensor is None:
        return ()
    return tuple(map(size_expression, tensor.shape))


def sizes_product(shape: Shape) -> sympy.Expr:
    """Return the number of elements of a shape."""
    return sympy.Mul(*shape)


def count_flops(node: fx.Node) -> sympy.Expr:
    """Return the floating-point operations of ``node``; 0 for whatever multiplies no matrices."""
    if node.op not in ("call_function", "call_method"):
        return sympy.Integer(0)
    rule = _RULES.get(op_name(node))
    return sympy.Integer(0) if rule is None else rule(node)


def hidden_flops(node: fx.Node) -> sympy.Expr:
    """Return how many of :func:`count_flops` causality hides, of a prompt's attention with as many keys as queries.

    Kernels leave them out, to within a block; a mask they multiply in full.
    """
    causal = op_name(node) == "scaled_dot_product_attention" and bool(_argument(node, 5, "is_causal"))
    if not causal and op_name(node) != "banded_attention":
        return sympy.Integer(0)
    query, key, value = _attention_shapes(node)
    window = key[-2] if causal else sympy.Min(band_of(node).window, key[-2])
    return sizes_product(query[:-2]) * window * (window - 1) * (query[-1] + value[-1])


def _argument(node: fx.Node, index: int, *names: str) -> Any:
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _product(index: int, *names: str) -> Callable[[fx.Node], sympy.Expr]:
    """Count a matrix product: each output element sums over the last dimension of the argument at ``index``."""

    def count(node: fx.Node) -> sympy.Expr:
        left = shape_of(_argument(node, index, *names))
        return 2 * sizes_product(shape_of(node)) * left[-1] if left else sympy.Integer(0)

    return count


def _attention_shapes(node: fx.Node) -> tuple[Shape, Shape, Shape]:
    query, key, value = (shape_of(_argument(node, index, name)) for index, name in enumerate(("query", "key", "value")))
    return query, key, value


def _attention(node: fx.Node) -> sympy.Expr:
    query, key, value = _attention_shapes(node)
    if not query or not key or not value:
        return sympy.Integer(0)
    return 2 * sizes_product(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _banded_attention(node: fx.Node) -> sympy.Expr:
    query, key, value = _attention_shapes(node)
    band = band_of(node)
    seen = (query[-2] - band.tail) * sympy.Min(band.window + band.sinks, key[-2]) + band.tail * key[-2]
    return 2 * sizes_product(query[:-2]) * seen * (query[-1] + value[-1])


def _convolution(node: fx.Node) -> sympy.Expr:
    # The weight is (out channels, in channels / groups, *kernel): each output element sums over all but the first.
    weight = shape_of(_argument(node, 1, "weight"))
    return 2 * sizes_product(shape_of(node)) * sizes_product(weight[1:])


def _einsum(node: fx.Node) -> sympy.Expr:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return sympy.Integer(0)
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, sympy.Expr] = {}
    for term, operand in zip(terms, operands, strict=True):
        sizes.update(zip(term, shape_of(operand), strict=True))
    return 2 * sizes_product(tuple(sizes.values()))


_RULES: dict[str, Callable[[fx.Node], sympy.Expr]] = {
    "linear": _product(0, "input"),
    "matmul": _product(0, "input"),
    "__matmul__": _product(0),
    "mm": _product(0, "input"),
    "bmm": _product(0, "input"),
    "mv": _product(0, "input"),
    "addmm": _product(1, "mat1"),
    "baddbmm": _product(1, "batch1"),
    "addbmm": _product(1, "batch1"),
    # Mixtures of experts: row r of the first operand meets the matrix of its own expert only.
    "grouped_mm": _product(0, "input"),
    "_grouped_mm": _product(0, "input"),
    "grouped_mm_fallback": _product(0, "input"),
    "einsum": _einsum,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "scaled_dot_product_attention": _attention,
    "flex_attention": _attention,
    "banded_attention": _banded_attention,
}
