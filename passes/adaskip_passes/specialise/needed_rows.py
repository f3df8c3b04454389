"""Which rows of each value of a graph are read, and what computes no fewer.

Slices ``x[:, :k]`` and ``x[:, -k:]`` say which rows are read. From there the demand goes up, as far as operations work row by
row (:mod:`adaskip_passes.analysis.row_rules`); where rows change places, a branch may compute those that are wanted of the
stream's (:mod:`adaskip_passes.specialise.token_branches`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.analysis.row_rules import Demand, Rows, operand_rows, sliced_rows
from adaskip_passes.ir.graph import (
    ATTENTION_ARGUMENTS,
    fake_tensor,
    fake_value,
    named_arguments,
    op_name,
    size_expression,
    tensor_of,
)
from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION, band_of
from adaskip_passes.specialise.narrow_branch import NarrowBranch
from adaskip_passes.specialise.token_branches import TokenBranch, TokenBranches
from adaskip_passes.stream.stream import ResidualStream

log = logging.getLogger(__name__)

# What stands for all rows of a value.
ALL = None


@dataclass(frozen=True)
class NeededRows:
    """Which ``rows`` of each value that is read are needed: :data:`ALL`, or a few first and last ones.

    ``branches`` are computed again, of fewer tokens, for the rows of the node that they are under. ``stops`` gives, for
    each value that is computed whole though few rows of it are needed, the operation that is not known to keep rows apart.
    """

    rows: dict[fx.Node, Rows | None]
    branches: dict[fx.Node, NarrowBranch]
    stops: dict[fx.Node, fx.Node]


def needed_rows(gm: fx.GraphModule, stream: ResidualStream, longest: int) -> NeededRows:
    """Return which rows of each value that is read are needed, where slices of up to ``longest`` rows count as few."""
    return _Demand(gm, stream, longest).run()


class _Demand:
    """One walk up a graph, from its outputs and effects to the rows that they need."""

    def __init__(self, gm: fx.GraphModule, stream: ResidualStream, longest: int) -> None:
        self._gm, self._longest = gm, longest
        self._effects = find_effects(gm)
        self._writes = self._effects.written()
        self._written = {write.root for write in self._effects.writes}
        self._branches = TokenBranches(gm, stream, self._effects)
        self._read: set[fx.Node] = set()
        self._found = NeededRows({}, {}, {})

    def run(self) -> NeededRows:
        """Visit every node after all that read it."""
        needed = self._found.rows
        for node in reversed(self._gm.graph.nodes):
            if self._acts(node):
                needed[node] = ALL  # it runs as it is: a second one for some rows would act a second time
                self._visit(node, ALL)
            elif node in needed:
                self._visit(node, needed[node])
        for node in [node for node, rows in needed.items() if rows is not ALL and _is_item_of_whole(node, needed)]:
            needed[node] = ALL
        return self._found

    def _acts(self, node: fx.Node) -> bool:
        """Tell whether ``node`` must run as it is: for what it does, or what it writes for a later node to read."""
        if node.op == "output" or node in self._effects.checks:
            return True
        return any(root.op in ("placeholder", "get_attr") or root in self._read for root in self._writes.get(node, ()))

    def _visit(self, node: fx.Node, rows: Rows | None) -> None:
        sliced = sliced_rows(node)
        if rows is ALL and sliced is not None and sliced.count <= self._longest:
            self._need(node.args[0], sliced)  # type: ignore[arg-type]
            return
        demands = None if rows is ALL else self._demands(node, rows)
        if demands is None and rows is not ALL:
            if self._take_branch(node, rows):
                return
            self._found.rows[node] = ALL
        wanted = dict(demands or ())
        for operand in node.all_input_nodes:
            part = wanted.get(operand, ALL)
            if part is ALL or part.count:
                self._need(operand, part)

    def _need(self, node: fx.Node, rows: Rows | None) -> None:
        needed = self._found.rows
        if rows is ALL:
            self._found.stops.pop(node, None)  # somebody reads it whole
        rows = _joined(needed.get(node, rows), rows)
        if _are_all(node, rows):
            rows = ALL
        if rows is not ALL and self._effects.roots[node] in self._written:
            # Its rows are those of memory that is written: a branch that has all of it to itself may compute them.
            rows = rows if self._branch(node, rows) is not None else ALL
        needed[node] = rows
        self._read.add(self._effects.roots[node])

    def _demands(self, node: fx.Node, rows: Rows) -> tuple[Demand, ...] | None:
        """Return what ``node`` needs of its operands for ``rows``, None where it cannot be computed in part."""
        found = operand_rows(node, rows)
        if found is None or any(max(part.head, part.tail) > self._longest for _, part in found):
            return None
        if any(self._effects.roots[operand] in self._written for operand, _ in found):
            return None
        return found if _can_be_narrowed(node, rows) else None

    def _branch(self, node: fx.Node, rows: Rows) -> TokenBranch | None:
        """Return the branch that computes ``node``; where there is none, say at which operation it stops."""
        if node.op not in ("call_function", "call_method"):
            return None
        branch = self._branches.find(node, rows.dim)
        if branch is None:
            self._found.stops[node] = self._branches.stopped_by(node, rows.dim)
        return branch

    def _take_branch(self, node: fx.Node, rows: Rows) -> bool:
        """Have ``rows`` of ``node`` computed by a branch of their own, if there is one."""
        branch = self._branch(node, rows)
        if branch is None:
            return False
        try:
            self._found.branches[node] = NarrowBranch(branch, rows)
        except ValueError as error:
            log.debug("%s", error)
            self._found.stops[node] = node
            return False
        self._need(branch.source, rows.along(branch.dim))
        for operand in branch.reads:
            self._need(operand, ALL)
        return True


def _is_item_of_whole(node: fx.Node, needed: Mapping[fx.Node, Rows | None]) -> bool:
    """Tell whether ``node`` is one of several results of which others are read whole: it is not computed in part."""
    source = node.args[0] if node.args else None
    several = isinstance(source, fx.Node) and isinstance(fake_value(source), (tuple, list))
    return several and needed.get(source) is ALL  # type: ignore[arg-type]


def stopped_at(gm: fx.GraphModule, stream: ResidualStream, longest: int) -> tuple[tuple[str, str], ...]:
    """Return (path, operation) of each sublayer a few of whose rows are read, but for an operation that is not known."""
    stops = needed_rows(gm, stream, longest).stops
    owners = {node: sublayer.path for sublayer in stream.sublayers for node in sublayer.nodes}
    found = {owners[node]: op_name(by) for node, by in stops.items() if node in owners and _is_work(node)}
    return tuple(found.items())


def _is_work(node: fx.Node) -> bool:
    """Tell whether ``node`` computes floats: neither positions nor a selection of rows that were selected before."""
    value = fake_tensor(node)
    return value is not None and value.is_floating_point() and sliced_rows(node) is None


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


def _can_be_narrowed(node: fx.Node, rows: Rows) -> bool:
    """Tell whether a mask can be made for those queries of an attention that are left."""
    if not hides_by_position(node):
        return True
    if node.target is BANDED_ATTENTION:
        band = band_of(node)
        if (band.sinks or band.tail) and (band.first != 0 or rows.tail > band.tail or rows.head > band.window):
            return False  # some of them have a window, and some none
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    return count_of_queries(node, given) is not None


def hides_by_position(node: fx.Node) -> bool:
    """Tell whether ``node`` is an attention that says by positions alone which keys a query sees."""
    if node.target is BANDED_ATTENTION:
        return True
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    return op_name(node) == "scaled_dot_product_attention" and bool(given.get("is_causal"))


def count_of_queries(node: fx.Node, given: Mapping[str, Any]) -> fx.Node | int | None:
    """Return the number of queries of an attention, or a node before it that gives it, None where there is none."""
    query, key = tensor_of(given["query"]), tensor_of(given["key"])
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
