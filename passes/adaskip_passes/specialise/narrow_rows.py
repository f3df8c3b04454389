"""Compute only the rows that somebody reads.

Where a graph reads the first or last rows of a value alone, what computes it is narrowed to those rows, as far up as
operations work row by row (:mod:`adaskip_passes.analysis.row_rules`)::

    %f = linear(silu(linear(%h, %up)), %down)        %h_rows = getitem(%h, (:, -1:))
    %b = add(%a, %f)                                 %f_rows = linear(silu(linear(%h_rows, %up)), %down)
    %last = getitem(%b, (:, -1:))                    %last = add(getitem(%a, (:, -1:)), %f_rows)

Attention needs keys and values of all rows, and of a query, its scores and its output those that are asked for. So where
a caller asks for the logits of the last token, the last layer runs for that token alone but for its keys and values.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.analysis.row_rules import SHAPED, Demand, Rows, operand_rows, result, shape_argument, sliced_rows
from adaskip_passes.banded_attention import BANDED_ATTENTION
from adaskip_passes.effects import find_effects, op_name
from adaskip_passes.graph import (
    ATTENTION_ARGUMENTS,
    call,
    computed_value,
    fake_tensor,
    fake_value,
    named_arguments,
    size_expression,
)
from adaskip_passes.pipeline import PassResult
from adaskip_passes.residual_stream import ResidualStream


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
        needed, _ = needed_rows(gm, self.longest)
        if not any(isinstance(rows, Rows) for rows in needed.values()):
            return PassResult(stream, False, 0)
        narrowing = _Narrowing(gm, stream, needed)
        narrowing.run()
        return PassResult(narrowing.stream(stream), True, narrowing.narrowed)


# What stands for all rows of a value.
ALL = None


def needed_rows(gm: fx.GraphModule, longest: int) -> tuple[dict[fx.Node, Rows | None], list[fx.Node]]:
    """Return which rows of each value that is read are needed, and the operations that stop at what is unknown of them.

    :data:`ALL` stands for more than the few first and last ones that slices of up to ``longest`` ask for.
    """
    effects = find_effects(gm)
    stops: list[fx.Node] = []
    written = {write.root for write in effects.writes}
    writers = {write.node for write in effects.writes}
    needed: dict[fx.Node, Rows | None] = {}

    def need(node: fx.Node, rows: Rows | None) -> None:
        rows = _joined(needed.get(node, rows), rows)
        needed[node] = ALL if effects.roots[node] in written or _are_all(node, rows) else rows

    for node in reversed(gm.graph.nodes):
        acts = node.op == "output" or node in writers or node in effects.checks
        if node not in needed and not acts:
            continue
        rows = ALL if acts else needed[node]
        sliced = sliced_rows(node)
        if rows is ALL and sliced is not None and sliced.count <= longest and not acts:
            need(node.args[0], sliced)  # type: ignore[arg-type]
            continue
        demands = None if rows is ALL else _demands(node, rows, longest)
        if demands is not None and any(effects.roots[operand] in written for operand, _ in demands):
            demands = None
        if demands is None and rows is not ALL:
            needed[node] = ALL
            if node.op in ("call_function", "call_method"):
                stops.append(node)
        wanted = dict(demands or ())
        for operand in node.all_input_nodes:
            part = wanted.get(operand, ALL)
            if part is ALL or part.count:
                need(operand, part)
    for node in [node for node, rows in needed.items() if rows is not ALL and _is_item_of_whole(node, needed)]:
        needed[node] = ALL
    return needed, stops


def _is_item_of_whole(node: fx.Node, needed: Mapping[fx.Node, Rows | None]) -> bool:
    """Tell whether ``node`` is one of several results of which others are read whole: it is not computed in part."""
    source = node.args[0] if node.args else None
    several = isinstance(source, fx.Node) and isinstance(fake_value(source), (tuple, list))
    return several and needed.get(source) is ALL  # type: ignore[arg-type]


def stopped_at(gm: fx.GraphModule, stream: ResidualStream, longest: int) -> tuple[tuple[str, str], ...]:
    """Return (path, operation) of each sublayer a few of whose rows are read, but for an operation that is not known."""
    _, stops = needed_rows(gm, longest)
    owners = {node: sublayer.path for sublayer in stream.sublayers for node in sublayer.nodes}
    found = {owners[node]: op_name(node) for node in stops if node in owners and _is_work(node)}
    return tuple(found.items())


def _is_work(node: fx.Node) -> bool:
    """Tell whether ``node`` computes floats: neither positions nor a selection of rows that were selected before."""
    value = fake_tensor(node)
    return value is not None and value.is_floating_point() and sliced_rows(node) is None


def _demands(node: fx.Node, rows: Rows, longest: int) -> tuple[Demand, ...] | None:
    """Return what ``node`` needs of its operands for ``rows``, None where it cannot be computed in part."""
    found = operand_rows(node, rows)
    if found is None or any(max(part.head, part.tail) > longest for _, part in found):
        return None
    return found if _can_be_narrowed(node) else None


def _are_all(node: fx.Node, rows: Rows | None) -> bool:
    """Tell whether a value has no other rows than those."""
    value = fake_value(node)
    if rows is ALL or not isinstance(value, torch.Tensor):
        return rows is ALL
    size = size_expression(value.shape[rows.dim])
    return bool(size.is_Integer and int(size) <= rows.count)


def _joined(one: Rows | None, other: Rows | None) -> Rows | None:
    if one is ALL or other is ALL or one.dim != other.dim:
        return ALL
    return Rows(one.dim, max(one.head, other.head), max(one.tail, other.tail))


def _can_be_narrowed(node: fx.Node) -> bool:
    """Tell whether a mask can be made for those queries of an attention that are left."""
    if not _hides_by_position(node):
        return True
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    return _counted(node, given) is not None


def _hides_by_position(node: fx.Node) -> bool:
    if node.target is BANDED_ATTENTION:
        return True
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    return op_name(node) == "scaled_dot_product_attention" and bool(given.get("is_causal"))


def _counted(node: fx.Node, given: Mapping[str, Any]) -> fx.Node | int | None:
    """Return the number of queries of an attention, or a node before it that gives it, None where there is none."""
    query, key = fake_tensor(given["query"]), fake_tensor(given["key"])
    assert query is not None
    assert key is not None
    queries = query.shape[-2]
    if isinstance(queries, int):
        return queries
    if size_expression(key.shape[-2]) == size_expression(queries):
        return given["key"]
    for one in node.graph.find_nodes(op="placeholder"):
        value = fake_value(one)
        if isinstance(value, torch.SymInt) and value.node.expr == size_expression(queries):
            return one
    return None


class _Narrowing:
    """One run of the pass: the narrowed values, and the selections that were made on the way."""

    def __init__(self, gm: fx.GraphModule, stream: ResidualStream, needed: Mapping[fx.Node, Rows | None]) -> None:
        self.graph, self.needed = gm.graph, needed
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
        if _hides_by_position(node):
            self._mask(new, node, rows)
        new.meta = dict(node.meta)
        new.meta["example_value"] = computed_value(new)
        self._own(new, node)
        return new

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
        given = named_arguments(new, ATTENTION_ARGUMENTS)
        first: Any = 0
        window: Any = None
        if node.target is BANDED_ATTENTION:
            *operands, first, window, scale = new.args
            given = dict(zip(ATTENTION_ARGUMENTS, operands, strict=False)) | {"scale": scale}
            given["enable_gqa"] = _groups(node)
            new.target = torch.nn.functional.scaled_dot_product_attention
        query, key = (fake_tensor(named_arguments(node, ATTENTION_ARGUMENTS)[name]) for name in ("query", "key"))
        assert query is not None
        assert key is not None
        sees_all = window is None and not rows.head and rows.tail == 1
        if sees_all and size_expression(query.shape[-2]) == size_expression(key.shape[-2]):
            mask = None
        else:
            mask = self._visible(new, node, rows, first, window)
        operands = [given.pop(name) for name in ATTENTION_ARGUMENTS[:3]]
        new.args, new.kwargs = tuple(operands), {**given, "attn_mask": mask, "is_causal": False}

    def _visible(self, new: fx.Node, node: fx.Node, rows: Rows, first: Any, window: Any) -> fx.Node:
        """Return the mask ``bool[rows, keys]`` of which keys lie ``first`` to before ``first + window`` tokens behind a query."""
        given = named_arguments(node, ATTENTION_ARGUMENTS)
        counted, key = _counted(node, given), given["key"]
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
    query, key = (fake_tensor(one) for one in node.args[:2])
    assert query is not None
    assert key is not None
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
    value = fake_tensor(node)
    assert value is not None
    shape = [count if at == dim else size for at, size in enumerate(value.shape)]
    with value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
        return torch.empty_strided(shape, value.stride(), dtype=value.dtype, device=value.device)
