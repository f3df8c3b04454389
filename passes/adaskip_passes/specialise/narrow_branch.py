"""Compute a branch again, of fewer tokens.

A branch that :mod:`adaskip_passes.specialise.token_branches` has found is copied, with the rows that are wanted in place of
those of all tokens. Its sizes follow: what is reshaped, expanded, filled or counted is given as many rows as there are now.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.analysis.row_rules import Rows
from adaskip_passes.analysis.token_layouts import Tokens
from adaskip_passes.analysis.token_rules import FILLS, VIEWS
from adaskip_passes.ir.graph import call, computed_value, fake_tensor, fake_value, op_name, size_expression, tensor_of
from adaskip_passes.specialise.token_branches import TokenBranch, operands


class NarrowBranch:
    """A ``branch`` for ``rows`` of its result, as a graph of its own: of the source's rows, then what else it reads.

    Raises:
        ValueError: PyTorch cannot compute the branch of so many rows, or its result has another shape.
    """

    def __init__(self, branch: TokenBranch, rows: Rows) -> None:
        self.source, self.dim = branch.source, branch.dim
        self._branch, self._count = branch, rows.count
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        source = tensor_of(branch.source)
        self._batch, self._rows = (size_expression(source.shape[dim]) for dim in (0, branch.dim))
        try:
            self._copy()
        except Exception as error:  # whatever an operation raises of sizes that it was not captured with
            raise ValueError(f"{branch.result.name} cannot be computed of {rows.count} rows: {error}") from error

    def insert(self, graph: fx.Graph, source: fx.Node) -> dict[fx.Node, fx.Node]:
        """Add the branch to ``graph`` at its insertion point, computed of ``source``.

        Return the copy of each of its nodes; a size that the copy computes is not among them.
        """
        inputs = self._graph.find_nodes(op="placeholder")
        images = dict(zip(inputs, (source, *self._branch.reads), strict=True))
        graph.graph_copy(self._graph, images)
        return {node: images[self._copies[node]] for node in self._branch.nodes}

    def _copy(self) -> None:
        branch = self._branch
        for node in (branch.source, *branch.reads):
            self._copies[node] = self._graph.placeholder(node.name)
            self._copies[node].meta["example_value"] = fake_value(node)
        narrow = self._with_fewer_rows(branch.source, branch.dim)
        self._copies[branch.source].meta["example_value"] = narrow
        for node in branch.nodes:
            self._copies[node] = self._copied(node)
        found = fake_tensor(self._copies[branch.result])
        wanted = self._with_fewer_rows(branch.result, branch.result_dim)
        if found is None or _sizes_of(found) != _sizes_of(wanted):
            raise ValueError(f"its shape is {None if found is None else tuple(found.shape)}")

    def _with_fewer_rows(self, node: fx.Node, dim: int) -> torch.Tensor:
        value = tensor_of(node)
        return value.new_empty([self._count if at == dim else size for at, size in enumerate(value.shape)])

    def _copied(self, node: fx.Node) -> fx.Node:
        name = op_name(node)
        op, target = node.op, node.target
        args: tuple[Any, ...]
        kwargs: dict[str, Any] = {}
        read: list[Any] = [self._copies[one] for one in operands(node)]
        if name in VIEWS:
            # Fewer rows need not lie so that a view of them could be had.
            op, target, args = "call_method", "reshape", (*read, self._reshaped(node))
        elif name == "expand":
            args = (*read, *self._expanded(node))
        elif name == "arange":
            args, kwargs = tuple(self._filled(node)), node.kwargs
        elif name in FILLS and not name.endswith("_like"):
            args, kwargs = self._fill_arguments(node, read)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._copies.__getitem__)
        new = self._graph.create_node(op, target, args, kwargs, name=node.name)
        new.meta = {**node.meta, "example_value": computed_value(new)}
        return new

    def _reshaped(self, node: fx.Node) -> list[int]:
        """Return the sizes of a view, -1 for one that is open."""
        sizes = [int(size) if size.is_Integer else -1 for size in self._sizes(node)]
        if sizes.count(-1) > 1:
            raise ValueError(f"{node.name} has several sizes that are open")
        return sizes

    def _expanded(self, node: fx.Node) -> list[int]:
        """Return the sizes of an expansion, -1 for those that stay: it makes no rows."""
        counted = self._counted(node)
        return [-1 if at in counted else int(size) for at, size in enumerate(self._sizes(node))]

    def _fill_arguments(self, node: fx.Node, read: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that make memory of fewer rows, filled with the same number."""
        kwargs = dict(node.kwargs)
        kwargs.pop("size", None)
        number = node.args[-1:] if op_name(node) in ("full", "new_full") and "fill_value" not in kwargs else ()
        return (*read, self._filled(node), *number), kwargs

    def _filled(self, node: fx.Node) -> list[int | fx.Node]:
        """Return the sizes of memory, each a number or a node that computes it."""
        return [int(size) if size.is_Integer else self._size_node(size) for size in self._sizes(node)]

    def _size_node(self, size: sympy.Expr) -> fx.Node:
        factor = size / self._batch
        if not factor.is_Integer:
            raise ValueError(f"{size} is no multiple of the batch size")
        batch = call(self._graph, "size", self._copies[self._branch.source], 0)
        return call(self._graph, operator.mul, batch, int(factor))

    def _sizes(self, node: fx.Node) -> list[sympy.Expr]:
        """Return the sizes of ``node`` with fewer rows."""
        value = tensor_of(node)
        sizes = _sizes_of(value)
        grown = [at for at in self._counted(node) if self._is_multiple(sizes[at])]
        if len(grown) != 1:
            raise ValueError(f"which size of {node.name} follows its rows is not clear")
        sizes[grown[0]] = sizes[grown[0]] / self._rows * self._count
        return sizes

    def _counted(self, node: fx.Node) -> range:
        """Return the dimensions of ``node`` that count rows."""
        rows = self._branch.layouts[node]
        return range(rows.start, rows.stop) if isinstance(rows, Tokens) else range(1)

    def _is_multiple(self, size: sympy.Expr) -> bool:
        """Tell whether a size is so many times the number of rows."""
        times = size / self._rows
        return times.as_coeff_Mul()[0].is_Integer and times.free_symbols.isdisjoint(self._rows.free_symbols)


def _sizes_of(value: torch.Tensor) -> list[sympy.Expr]:
    return [size_expression(size) for size in value.shape]
