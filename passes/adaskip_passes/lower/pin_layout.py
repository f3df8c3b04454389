"""Have the outputs that were captured contiguous come out so.

Inductor lowers ``cat([empty, keys])``, with which a cache begins, to a clone in the layout of ``keys``. Dynamo guards on
strides: each such cache would be captured once more in the next step::

    %k = cat(%empty, %keys)        %k = cat(%empty, %keys)
    output(%k)                     %c = contiguous(%k)
                                   output(%c)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from adaskip_passes.ir.graph import call, fake_tensor
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class PinLayout:
    """Make the outputs contiguous that were captured so."""

    name: ClassVar[str] = "pin-layout"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        output, pinned = gm.graph.output_node(), dict[fx.Node, fx.Node]()

        def pin(node: fx.Node) -> fx.Node:
            value = fake_tensor(node)
            if value is None or node.op == "placeholder" or not value.is_contiguous():
                return node
            if node not in pinned:
                pinned[node] = call(gm.graph, "contiguous", node)
            return pinned[node]

        with gm.graph.inserting_before(output):
            output.args = fx.node.map_arg(output.args, pin)
        return PassResult(stream, bool(pinned), len(pinned))
