"""Measure similarity and scale at sublayer boundaries (AdaSkip Eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import call, fake_tensor, tensor_of
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream, Sublayer

STATISTICS = ("similarity", "scale_token", "scale_frobenius")


@dataclass(frozen=True)
class InsertProbes:
    """Add one output, ``f32[len(paths), 3]``: for each sublayer, over all tokens of the call,

    0. the mean of cosine(a, b), the similarity (Eq. 2);
    1. the mean of ``||b|| / ||a||``, the scale (Eq. 3);
    2. ``||B|| / ||A||`` of the whole tensors, the scale by Frobenius norms.

    Rows are in the order of ``paths``. A span ``(first, last)`` of ``spans`` measures all sublayers from the
    first to the last as one, such as a whole layer; their rows come after. Nothing else changes: the other
    outputs stay bit for bit what they were. Run it before ``skip-sublayers`` on the same graph, and only on
    sublayers that stay.
    """

    name: ClassVar[str] = "insert-probes"
    paths: tuple[str, ...] = ()
    spans: tuple[tuple[str, str], ...] = ()

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Probe ``paths``; :class:`UnknownSublayerError` where the stream lacks one."""
        if self.paths == stream.probed:
            return PassResult(stream, False, 0)
        if stream.probed:
            raise PassError("this graph has probes already; probe all sublayers in one pass")
        for path in self.paths:
            if path in stream.skipped:
                raise PassError(f"cannot probe {path}: it is skipped")
            if not _same_rows(stream.by_path(path)):
                raise PassError(f"cannot probe {path}: only some of its rows are computed; probe before narrow-rows")
        for first, last in self.spans:
            if first not in self.paths or last not in self.paths:
                raise PassError(f"cannot probe from {first} to {last}: both ends of a span are to be probed themselves")
        rows = _rows(gm, stream, (*((path, path) for path in self.paths), *self.spans))
        output = gm.graph.output_node()
        results = output.args[0]
        output.args = ((*results, rows),)  # type: ignore[misc]
        return PassResult(replace(stream, probed=self.paths), True, len(self.paths))


def _same_rows(sublayer: Sublayer) -> bool:
    before, after = fake_tensor(sublayer.stream_in), fake_tensor(sublayer.stream_out)
    return before is None or after is None or before.dim() != after.dim() or str(before.shape) == str(after.shape)


def _rows(gm: fx.GraphModule, stream: ResidualStream, spans: tuple[tuple[str, str], ...]) -> fx.Node:
    graph = gm.graph
    between = [(stream.by_path(first).stream_in, stream.by_path(last).stream_out) for first, last in spans]
    values = _kept_values(gm, dict.fromkeys(node for pair in between for node in pair))
    pairs = [(values[before], values[after]) for before, after in between]
    with graph.inserting_before(graph.output_node()):
        at_once = stream.phase == "decode" and len({_layout(value) for value in values.values()}) == 1
        return _statistics(graph, *(_sums_at_once if at_once else _sums_in_turn)(graph, pairs))


def _layout(node: fx.Node) -> tuple[object, ...]:
    value = tensor_of(node)
    return (value.dtype, *map(str, value.shape))


def _sums_at_once(graph: fx.Graph, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return the products a.b, a.a and b.b of each token, ``f32[pairs, tokens]``, from copies side by side.

    For single tokens: a dozen calls in all, where one by one they would be as many for each sublayer.
    """
    befores, afters = (
        call(graph, "float", call(graph, torch.stack, ends)) for ends in map(list, zip(*pairs, strict=True))
    )
    products = [
        call(graph, "sum", product, -1)
        for product in (
            call(graph, torch.mul, befores, afters),
            call(graph, "square", befores),
            call(graph, "square", afters),
        )
    ]
    dot, before, after = (call(graph, "flatten", product, 1) for product in products)
    return dot, before, after


def _sums_in_turn(graph: fx.Graph, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return the same as :func:`_sums_at_once` without a copy of the stream, which may be long."""
    # Over (tokens, d_model), whatever shape each end of the sublayer has.
    ends = dict.fromkeys(node for pair in pairs for node in pair)
    wide = {node: call(graph, "flatten", call(graph, "float", node), 0, -2) for node in ends}
    # The stream after one sublayer is the stream before the next: its norm is taken once.
    squares = {node: call(graph, "sum", call(graph, "square", value), -1) for node, value in wide.items()}
    dots = [call(graph, "sum", call(graph, torch.mul, wide[a], wide[b]), -1) for a, b in pairs]
    return (
        call(graph, torch.stack, dots),
        call(graph, torch.stack, [squares[a] for a, _ in pairs]),
        call(graph, torch.stack, [squares[b] for _, b in pairs]),
    )


def _statistics(graph: fx.Graph, dot: fx.Node, before: fx.Node, after: fx.Node) -> fx.Node:
    """Return ``f32[pairs, 3]`` from the products of each token."""
    safe = call(graph, "clamp_min", before, _TINY)
    inverse = call(graph, "rsqrt", safe)
    cosine = call(
        graph,
        torch.mul,
        call(graph, torch.mul, dot, inverse),
        call(graph, "rsqrt", call(graph, "clamp_min", after, _TINY)),
    )
    ratio = call(graph, torch.mul, call(graph, "sqrt", after), inverse)
    totals = [call(graph, "sum", squares, -1) for squares in (after, safe)]
    columns = [
        call(graph, "mean", cosine, -1),
        call(graph, "mean", ratio, -1),
        call(graph, "sqrt", call(graph, torch.div, *totals)),
    ]
    return call(graph, torch.stack, columns, -1)


def _kept_values(gm: fx.GraphModule, ends: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Map each node to a node that still has its value at the end of the graph.

    A stream written in place (``x += branch``) is overwritten by the next sublayer: it needs a copy.
    """
    effects = find_effects(gm)
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    last = {write.root: position[write.node] for write in effects.writes}
    values = {}
    for node in ends:
        values[node] = node
        if last.get(effects.roots[node], -1) > position[node]:
            with gm.graph.inserting_after(node):
                values[node] = call(gm.graph, "clone", node)
    return values


# A stream that is exactly zero has no direction: its similarity is 0 and nothing overflows.
_TINY = 1e-30
