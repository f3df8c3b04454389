"""Products of a stack of rows with one matrix, written as a product of two matrices.

PyTorch folds such a stack by itself where it can tell that the rows stand side by side. The last tokens of several
prompts do not, and of a number of tokens that is only known at run time it cannot tell. It then expands the
matrix to the batch and multiplies for each row of it, and of 16-bit floats the expanded matrix is copied first::

    %y = linear(%x, %w)          %rows = flatten(%x, 0, -2)
                                 %flat = linear(%rows, %w)
                                 %y = reshape(%flat, (size(%x, 0), size(%x, 1), out))
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.ir.graph import LINEAR_ARGUMENTS, call, fake_tensor, named_arguments, tensor_of
from adaskip_passes.ir.plain_tensors import is_plain
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream

_MATMUL_ARGUMENTS = ("input", "other")
_PRODUCTS: dict[Any, tuple[str, ...]] = {
    torch.nn.functional.linear: LINEAR_ARGUMENTS,
    torch.matmul: _MATMUL_ARGUMENTS,
    operator.matmul: _MATMUL_ARGUMENTS,
    "matmul": _MATMUL_ARGUMENTS,
    "__matmul__": _MATMUL_ARGUMENTS,
}


@dataclass(frozen=True)
class FoldRows:
    """Fold the stacks of rows that are multiplied with a matrix."""

    name: ClassVar[str] = "fold-rows"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        found = 0
        for node in list(gm.graph.nodes):
            # Looked at one by one: what one product gives may be what the next one multiplies.
            rows = _stack_of_rows(node)
            if rows is not None:
                _fold(gm.graph, node, rows)
                found += 1
        return PassResult(stream, found > 0, found)


def _fold(graph: fx.Graph, node: fx.Node, rows: fx.Node) -> None:
    stack, product = tensor_of(rows), tensor_of(node)
    with graph.inserting_before(node):
        flat = call(graph, "flatten", rows, 0, -2)
        # Also those that the capture took for constants: an inner compiler may be told to take them for any size.
        sizes = [call(graph, "size", rows, dim) for dim in range(stack.dim() - 1)]
    node.replace_input_with(rows, flat)
    with graph.inserting_after(node):
        stacked = graph.call_method("reshape", (node, (*sizes, product.shape[-1])))
    node.replace_all_uses_with(stacked, delete_user_cb=lambda user: user is not stacked)
    stacked.meta = dict(node.meta)
    node.meta["example_value"] = product.flatten(0, -2)


def _stack_of_rows(node: fx.Node) -> fx.Node | None:
    """Return the rows that ``node`` multiplies with a matrix, where they are a stack; None for any other node."""
    if node.op not in ("call_function", "call_method") or node.target not in _PRODUCTS:
        return None
    names = _PRODUCTS[node.target]
    given = named_arguments(node, names)
    rows, matrix = (given.get(name) for name in names[:2])
    stack, weight = fake_tensor(rows), fake_tensor(matrix)
    if rows is matrix or not is_plain(stack) or not is_plain(weight):
        return None
    return rows if tensor_of(rows).dim() > 2 and tensor_of(matrix).dim() == 2 else None
