"""Measure similarity and scale at sublayer boundaries (AdaSkip Eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from adaskip_passes.effects import find_effects
from adaskip_passes.errors import PassError
from adaskip_passes.graph import call
from adaskip_passes.pipeline import PassResult
from adaskip_passes.residual_stream import ResidualStream

STATISTICS = ("similarity", "scale_token", "scale_frobenius")


@dataclass(frozen=True)
class InsertProbes:
    """Add one output, ``f32[len(paths), 3]``: for each sublayer, over all tokens of the call,

    0. the mean of cosine(a, b), the similarity (Eq. 2);
    1. the mean of ``||b|| / ||a||``, the scale (Eq. 3);
    2. ``||B|| / ||A||`` of the whole tensors, the scale by Frobenius norms.

    Rows are in the order of ``paths``. Nothing else changes: the other outputs stay bit for bit what
    they were. Run it before ``skip-sublayers`` on the same graph, and only on sublayers that stay.
    """

    name: ClassVar[str] = "insert-probes"
    paths: tuple[str, ...] = ()

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Probe ``paths``; :class:`UnknownSublayerError` where the stream lacks one."""
        if self.paths == stream.probed:
            return PassResult(stream, False, 0)
        if stream.probed:
            raise PassError("this graph has probes already; probe all sublayers in one pass")
        for path in self.paths:
            stream.by_path(path)
            if path in stream.skipped:
                raise PassError(f"cannot probe {path}: it is skipped")
        rows = _rows(gm, stream, self.paths)
        output = gm.graph.output_node()
        results = output.args[0]
        output.args = ((*results, rows),)  # type: ignore[misc]
        return PassResult(replace(stream, probed=self.paths), True, len(self.paths))


def _rows(gm: fx.GraphModule, stream: ResidualStream, paths: tuple[str, ...]) -> fx.Node:
    graph = gm.graph
    sublayers = [stream.by_path(path) for path in paths]
    ends = dict.fromkeys(node for sublayer in sublayers for node in (sublayer.stream_in, sublayer.stream_out))
    values = _kept_values(gm, ends)
    with graph.inserting_before(graph.output_node()):
        # Over (tokens, d_model), whatever shape each end of the sublayer has.
        wide = {node: call(graph, "flatten", call(graph, "float", value), 0, -2) for node, value in values.items()}
        # The stream after one sublayer is the stream before the next: its norm is taken once.
        squares = {node: call(graph, "sum", call(graph, "square", value), -1) for node, value in wide.items()}
        inverse = {
            node: call(graph, "rsqrt", call(graph, "clamp_min", square, _TINY)) for node, square in squares.items()
        }
        cells = []
        for a, b in ((sublayer.stream_in, sublayer.stream_out) for sublayer in sublayers):
            dot = call(graph, "sum", call(graph, torch.mul, wide[a], wide[b]), -1)
            cosine = call(graph, torch.mul, call(graph, torch.mul, dot, inverse[a]), inverse[b])
            ratio = call(graph, torch.mul, call(graph, "sqrt", squares[b]), inverse[a])
            total_a, total_b = call(graph, "sum", squares[a]), call(graph, "sum", squares[b])
            frobenius = call(graph, "sqrt", call(graph, torch.div, total_b, call(graph, "clamp_min", total_a, _TINY)))
            cells.extend([call(graph, "mean", cosine), call(graph, "mean", ratio), frobenius])
        return call(graph, "view", call(graph, torch.stack, cells), len(paths), len(STATISTICS))


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
