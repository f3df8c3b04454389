"""Measure similarity and scale at sublayer boundaries (AdaSkip Eq. 2 and 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

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
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            rows = _rows(gm.graph, stream, self.paths)
        results = output.args[0]
        output.args = ((*results, rows),)  # type: ignore[misc]
        return PassResult(replace(stream, probed=self.paths), True, len(self.paths))


def _rows(graph: fx.Graph, stream: ResidualStream, paths: tuple[str, ...]) -> fx.Node:
    norms: dict[fx.Node, fx.Node] = {}

    def wide(node: fx.Node) -> fx.Node:
        return call(graph, "float", node)

    def squared_norm(node: fx.Node) -> fx.Node:
        # The stream after one sublayer is the stream before the next: its norm is taken once.
        if node not in norms:
            norms[node] = call(graph, "flatten", call(graph, "sum", call(graph, "square", wide(node)), -1))
        return norms[node]

    def inverse_norm(node: fx.Node) -> fx.Node:
        return call(graph, "rsqrt", call(graph, "clamp_min", squared_norm(node), _TINY))

    cells = []
    for path in paths:
        a, b = stream.by_path(path).stream_in, stream.by_path(path).stream_out
        dot = call(graph, "flatten", call(graph, "sum", call(graph, torch.mul, wide(a), wide(b)), -1))
        cosine = call(graph, torch.mul, call(graph, torch.mul, dot, inverse_norm(a)), inverse_norm(b))
        ratio = call(graph, torch.mul, call(graph, "sqrt", squared_norm(b)), inverse_norm(a))
        total_a, total_b = (call(graph, "sum", squared_norm(node)) for node in (a, b))
        frobenius = call(graph, "sqrt", call(graph, torch.div, total_b, call(graph, "clamp_min", total_a, _TINY)))
        cells.extend([call(graph, "mean", cosine), call(graph, "mean", ratio), frobenius])
    return call(graph, "view", call(graph, torch.stack, cells), len(paths), len(STATISTICS))


# A stream that is exactly zero has no direction: its similarity is 0 and nothing overflows.
_TINY = 1e-30
