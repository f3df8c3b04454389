"""Maps of the residual stream as regions of a wiring: compiled once for all sublayers and skip sets.

Op by op a map takes several times as long to decode a token as its arithmetic does. As a region it is
lowered like a sublayer; its tensors are inputs, so that all maps of one form and rank are the same region::

    %results = low_rank_map(%a, %adaskip_2_down, %adaskip_2_up, %adaskip_2_shift, ...)
    %b_skipped = getitem(%results, 0)

The inputs after the tensors give the symbols in the shape of a.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from adaskip_passes.analysis.regions import Region, symbol_inputs, symbols_of
from adaskip_passes.ir.graph import call, fake_tensor, fake_value, graph_module, tensor_of
from adaskip_passes.specialise.stream_maps import FORMS, emit_map


class MapRegions:
    """Adds maps to ``graph``, a wiring, as calls of regions."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._symbols = symbol_inputs(graph)
        self._made: dict[tuple[object, ...], Region] = {}

    def call(self, form: str, a: fx.Node, parts: Sequence[fx.Node]) -> fx.Node:
        """Add the call of a map and return b; ``parts`` are the tensors that ``FORMS`` names, in order."""
        stream = tensor_of(a)
        inputs = list(dict.fromkeys([a, *parts, *symbols_of([a], self._symbols)]))
        # Equal regions are found by their keys in the end, but making one for each map takes milliseconds.
        kind = (form, *map(_layout, inputs))
        if kind not in self._made:
            self._made[kind] = _map_region(form, inputs)
        results = call(self.graph, self._made[kind], *inputs, like=(stream,))
        return call(self.graph, operator.getitem, results, 0, like=stream)


def _layout(node: fx.Node) -> tuple[object, ...]:
    """Return what two inputs must agree in for one region to take either."""
    value = fake_tensor(node)
    if value is None:
        return (node,)
    return (value.dtype, value.device, str(value.shape), str(value.stride()))


def _map_region(form: str, inputs: Sequence[fx.Node]) -> Region:
    graph = fx.Graph()
    images = []
    for node in inputs:
        images.append(graph.placeholder(node.name))
        images[-1].meta["example_value"] = fake_value(node)
    a, *others = images
    graph.output((emit_map(graph, form, a, others[: len(FORMS[form])]),))
    return Region(f"{form}_map", graph_module({}, graph))
