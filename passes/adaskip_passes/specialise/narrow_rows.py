"""Compute only the rows that somebody reads.

Where a graph reads the first or last rows of a value alone, what computes it is narrowed to those rows, as far up as
operations work row by row (:mod:`adaskip_passes.analysis.row_rules`)::

    %f = linear(silu(linear(%h, %up)), %down)        %h_rows = getitem(%h, (:, -1:))
    %b = add(%a, %f)                                 %f_rows = linear(silu(linear(%h_rows, %up)), %down)
    %last = getitem(%b, (:, -1:))                    %last = add(getitem(%a, (:, -1:)), %f_rows)

Attention needs keys and values of all rows, and of a query, its scores and its output those that are asked for. So where
a caller asks for the logits of the last token, the last layer runs for that token alone but for its keys and values.

Where rows change places within a sublayer, as in a mixture of experts, all of it is computed again from the rows of the
stream, if it is proven to keep tokens apart (:mod:`adaskip_passes.specialise.token_branches`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.analysis.row_rules import SHAPED, Rows, operand_rows, result, shape_argument, sliced_rows
from adaskip_passes.ir.graph import (
    ATTENTION_ARGUMENTS,
    call,
    computed_value,
    fake_tensor,
    named_arguments,
    op_name,
    size_expression,
    tensor_of,
)
from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION, band_of
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.specialise.needed_rows import ALL, NeededRows, count_of_queries, hides_by_position, needed_rows
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class NarrowRows:
    """Narrow what computes rows of which only a few are read; ``longest`` is as many as every call is sure to have.

    Slices ``x[:, :k]`` and ``x[:, -k:]`` with k up to ``longest`` say which rows are read. What was computed for all
    rows is left to ``eliminate-dead-code``. ``matched`` counts the operations that were narrowed.
    """

    name: ClassVar[str] = "narrow-rows"
    longest: int = 1

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        found = needed_rows(gm, stream, self.longest)
        if not any(isinstance(rows, Rows) for rows in found.rows.values()):
            return PassResult(stream, False, 0)
        narrowing = _Narrowing(gm, stream, found)
        narrowing.run()
        return PassResult(narrowing.stream(stream), True, narrowing.narrowed)


class _Narrowing:
    """One run of the pass: the narrowed values, and the selections that were made on the way."""

    def __init__(self, gm: fx.GraphModule, stream: ResidualStream, found: NeededRows) -> None:
        self.graph, self.needed, self.branches = gm.graph, found.rows, found.branches
        self.narrowed = 0
        self.images: dict[fx.Node, fx.Node] = {}
        self.owner = {node: sublayer.index for sublayer in stream.sublayers for node in sublayer.nodes}
        self._selected: dict[tuple[fx.Node, Rows], fx.Node] = {}
        self._at = next(iter(gm.graph.nodes))

    def run(self) -> None:
        """Narrow what can be, in the order of the graph."""
        for node in list(self.graph.nodes):
            if node not in self.needed:  # nobody reads it
                continue
            self._at = node
            rows = self.needed[node]
            source = node.args[0] if node.args else None
            if rows is not ALL:
                self.images[node] = self._narrow(node, rows)
            elif isinstance(source, fx.Node) and source in self.images:
                sliced = sliced_rows(node)
                assert sliced is not None
                node.replace_all_uses_with(self._rows_of(source, sliced))

    def stream(self, stream: ResidualStream) -> ResidualStream:
        """Return ``stream`` over the graph as it is now."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        held: dict[int, list[fx.Node]] = {sublayer.index: [] for sublayer in stream.sublayers}
        for node, index in self.owner.items():
            held[index].append(node)

        def moved(node: fx.Node) -> fx.Node:
            return self.images.get(node, node)

        return replace(
            stream,
            sublayers=tuple(
                replace(
                    one.mapped(moved),
                    nodes=tuple(sorted(held[one.index], key=order.__getitem__)),
                    writes=one.writes,
                    cache_inputs=one.cache_inputs,
                )
                for one in stream.sublayers
            ),
        )

    def _narrow(self, node: fx.Node, rows: Rows) -> fx.Node:
        """Return ``rows`` of ``node``, computed from those rows of its operands."""
        if node in self.branches:
            return self._insert(node, rows)
        demands = operand_rows(node, rows)
        assert demands is not None
        sliced = sliced_rows(node)
        if sliced is not None and sliced.dim == rows.dim:
            # Of these rows of the operand it is a part itself.
            [(source, wanted)] = demands
            inner = self._rows_of(source, wanted)
            return inner if wanted.count == rows.count else self._select(inner, rows)
        self.narrowed += 1
        with self.graph.inserting_before(node):
            given = {operand: self._rows_of(operand, wanted) for operand, wanted in demands if wanted.count}
            args, kwargs = self._arguments(node, rows, given)
            new = self.graph.create_node(node.op, node.target, args, kwargs)
        if hides_by_position(node):
            self._mask(new, node, rows)
        new.meta = dict(node.meta)
        new.meta["example_value"] = computed_value(new)
        self._own(new, node)
        return new

    def _insert(self, node: fx.Node, rows: Rows) -> fx.Node:
        """Return ``rows`` of ``node``, computed by a branch of their own."""
        narrow = self.branches[node]
        source = self._rows_of(narrow.source, rows.along(narrow.dim))
        with self.graph.inserting_before(node):
            copies = narrow.insert(self.graph, source)
        self.narrowed += len(copies)
        for old, new in copies.items():
            self._own(new, old)
        return copies[node]

    def _arguments(self, node: fx.Node, rows: Rows, given: Mapping[fx.Node, fx.Node]) -> tuple[Any, Any]:
        if op_name(node) in ("cat", "concat") and rows.dim == _dim_of_cat(node):
            parts = list(given.values())
            return (parts, rows.dim), {}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: given.get(one, one))
        if op_name(node) in SHAPED:
            args = (args[0], shape_argument(node, rows))
        return args, kwargs

    def _rows_of(self, node: fx.Node, rows: Rows) -> fx.Node:
        """Return ``rows`` of ``node``, before the node that is being looked at."""
        if node not in self.images:
            return self._select(node, rows)
        return self.images[node] if self.needed[node] == rows else self._select(self.images[node], rows)

    def _select(self, node: fx.Node, rows: Rows) -> fx.Node:
        key = (node, rows)
        if key not in self._selected:
            made: list[fx.Node] = []
            with self.graph.inserting_before(self._at):
                self._selected[key] = select_rows(self.graph, node, rows, made)
            for one in made:
                self._own(one, node)
        return self._selected[key]

    def _own(self, new: fx.Node, source: fx.Node) -> None:
        """Let a new node belong to the sublayer that is being looked at; what is made of a value outside of all, to none."""
        index = self.owner.get(self._at)
        if source in self.owner and index is not None:
            self.owner[new] = index

    def _mask(self, new: fx.Node, node: fx.Node, rows: Rows) -> None:
        """Let the queries that are left see the keys that they saw, by a mask of their positions."""
        given: dict[str, Any] = named_arguments(new, ATTENTION_ARGUMENTS)
        first: Any = 0
        window: Any = None
        if node.target is BANDED_ATTENTION:
            band = band_of(new)
            given = {"query": band.query, "key": band.key, "value": band.value, "scale": band.scale}
            given["enable_gqa"] = _groups(node)
            # With a tail, the rows that are left are of it, or so early that no window hides a key from them.
            first, window = band.first, None if band.tail else band.window
            new.target = torch.nn.functional.scaled_dot_product_attention
        query, key = (tensor_of(named_arguments(node, ATTENTION_ARGUMENTS)[name]) for name in ("query", "key"))
        sees_all = first == 0 and window is None and not rows.head and rows.tail == 1
        if sees_all and size_expression(query.shape[-2]) == size_expression(key.shape[-2]):
            mask = None
        else:
            mask = self._visible(new, node, rows, first, window)
        operands = [given.pop(name) for name in ATTENTION_ARGUMENTS[:3]]
        new.args, new.kwargs = tuple(operands), {**given, "attn_mask": mask, "is_causal": False}

    def _visible(self, new: fx.Node, node: fx.Node, rows: Rows, first: Any, window: Any) -> fx.Node:
        """Return the mask ``bool[rows, keys]`` of which keys lie ``first`` to before ``first + window`` tokens behind a query."""
        given = named_arguments(node, ATTENTION_ARGUMENTS)
        counted, key = count_of_queries(node, given), given["key"]
        device = fake_tensor(key).device  # type: ignore[union-attr]
        made: list[fx.Node] = []

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            made.append(call(self.graph, target, *args, **kwargs))
            return made[-1]

        with self.graph.inserting_before(new):
            keys = make("size", key, -2)
            queries = make("size", counted, -2) if counted is key else counted
            at = select_rows(self.graph, make(torch.arange, queries, device=device), rows.along(0), made)
            behind = make(operator.sub, make(torch.unsqueeze, at, 1), make(torch.arange, keys, device=device))
            mask = make(operator.ge, behind, first)
            if window is not None:
                mask = make(operator.and_, mask, make(operator.lt, make(operator.sub, behind, first), window))
        for one in made:
            self._own(one, node)
        return mask


def _groups(node: fx.Node) -> bool:
    query, key = (tensor_of(one) for one in node.args[:2])
    return bool(size_expression(query.shape[1]) != size_expression(key.shape[1]))


def _dim_of_cat(node: fx.Node) -> int:
    dim = named_arguments(node, ("tensors", "dim")).get("dim", 0)
    return int(dim % result(node).dim())


def select_rows(graph: fx.Graph, node: fx.Node, rows: Rows, made: list[fx.Node] | None = None) -> fx.Node:
    """Add what selects ``rows`` of ``node`` at the insertion point of ``graph``; what it took is put on ``made``."""
    parts = []
    for count, cut in ((rows.head, slice(None, rows.head)), (rows.tail, slice(-rows.tail, None))):
        if count:
            index = (*[slice(None)] * rows.dim, cut)
            part = call(graph, operator.getitem, node, index, like=_with_rows(node, rows.dim, count))
            parts.append(part)
    made = [] if made is None else made
    made += parts
    if len(parts) == 1:
        return parts[0]
    made.append(call(graph, torch.cat, parts, rows.dim))
    return made[-1]


def _with_rows(node: fx.Node, dim: int, count: int) -> torch.Tensor:
    """Return the fake value of a view of ``count`` rows of ``node``, without asking whether it has so many."""
    value = tensor_of(node)
    shape = [count if at == dim else size for at, size in enumerate(value.shape)]
    with value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
        return torch.empty_strided(shape, value.stride(), dtype=value.dtype, device=value.device)
