"""Cut a graph into a chain of regions, so that equal sublayers can share one compiled artifact.

The wiring that is left calls one region a sublayer, and one for what stands before, between and after
them. It is a graph with a residual stream of its own, two orders of magnitude smaller than what it was
cut from: passes run on it as they do on the whole, so that another skip set is a matter of milliseconds.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from adaskip_passes.analysis.dependence import SHAPE_ONLY
from adaskip_passes.analysis.effects import CLOSING, OPENING, find_effects
from adaskip_passes.analysis.regions import Region, symbol_inputs, symbols_of
from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import fake_tensor, fake_value, graph_module, op_name
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream, Sublayer


@dataclass(frozen=True)
class OutlineRegions:
    """Cut a graph at its sublayers: what is left is the wiring, which calls the regions.

    Inputs and outputs stay as they are. Weights, cache tensors and symbolic sizes become inputs of their regions. Nodes
    that belong to no sublayer go to the region before the sublayers that read them.
    """

    name: ClassVar[str] = "outline-regions"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place; what matches are regions.

        Raises:
            PassError: Memory is written in an order that this would change.
        """
        parts = _parts(gm, stream)
        nodes: dict[int, list[fx.Node]] = {}
        for node, part in parts.items():
            nodes.setdefault(part, []).append(node)
        wiring = _Wiring(gm)
        for part in sorted(nodes):
            if part % 2 or any(_computes(node) for node in nodes[part]):
                wiring.call_region(nodes[part])
            else:
                wiring.keep(nodes[part])
        wiring.finish()
        gm.graph = wiring.graph
        outlined = replace(stream, sublayers=tuple(map(wiring.outlined, stream.sublayers)))
        return PassResult(outlined, modified=True, matched=wiring.regions)


def _computes(node: fx.Node) -> bool:
    """Tell whether a node is worth compiling: it makes floats, not sizes and positions."""
    value = fake_tensor(node)
    return value is not None and value.is_floating_point()


def _parts(gm: fx.GraphModule, stream: ResidualStream) -> dict[fx.Node, int]:
    """Return the part of each computing node: ``2k + 1`` for sublayer k, even numbers for what stands between.

    Reads and writes of one memory keep their order.
    """
    effects = find_effects(gm)
    writes = effects.written()
    fixed = _in_scopes(gm, {node: 2 * one.index + 1 for one in stream.sublayers for node in one.nodes})
    ends = {one.stream_out for one in stream.sublayers}
    parts: dict[fx.Node, int] = {}
    read: dict[fx.Node, int] = {}
    written: dict[fx.Node, int] = {}
    shaped: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        roots = {effects.roots[source] for source in node.all_input_nodes}
        changed = writes.get(node, ())
        before = [parts.get(source, 0) + (source in ends) for source in node.all_input_nodes]
        before += [written.get(root, 0) for root in roots] + [read.get(root, 0) for root in changed]
        earliest = max(before, default=0)
        # What has the size of a value inside a sublayer, and nothing of its values, is needed there.
        if node not in fixed and _sizes_only(node, parts, shaped):
            shaped.add(node)
        parts[node] = fixed.get(node, earliest if node in shaped else earliest + earliest % 2)
        if parts[node] < earliest:
            raise PassError(f"cannot cut the graph at its sublayers: {node.name} must run later than its sublayer does")
        for root in roots:
            read[root] = max(read.get(root, 0), parts[node])
        for root in changed:
            written[root] = max(written.get(root, 0), parts[node])
    return parts


def _sizes_only(node: fx.Node, parts: dict[fx.Node, int], shaped: set[fx.Node]) -> bool:
    if fake_tensor(node) is None or op_name(node) in SHAPE_ONLY:
        return True
    return all(source in shaped or not parts.get(source, 0) for source in node.all_input_nodes)


def _in_scopes(gm: fx.GraphModule, fixed: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Return ``fixed`` with all nodes of a scope (vmap, autocast) in the part of the sublayer that opened it."""
    depth, inside = 0, list[fx.Node]()
    scoped = dict(fixed)
    for node in gm.graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        depth += name in OPENING
        if depth:
            inside.append(node)
        depth -= name in CLOSING
        if inside and not depth:
            parts = {fixed[one] for one in inside if one in fixed}
            if len(parts) > 1:
                raise PassError(f"cannot cut the graph at its sublayers: {inside[0].name} opens a scope around several")
            scoped.update(dict.fromkeys(inside, parts.pop() if parts else 0))
            inside = list[fx.Node]()
    return scoped


class _Wiring:
    """The graph that calls the regions, while it is made."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.source, self.graph = gm, fx.Graph()
        self.regions = 0
        self.distinct: dict[str, Region] = {}
        self.images: dict[fx.Node, fx.Node] = {}
        self.calls: dict[fx.Node, fx.Node] = {}
        self.symbols = symbol_inputs(gm.graph)
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._copy(node)

    def _copy(self, node: fx.Node) -> None:
        image = self.graph.node_copy(node, self.images.__getitem__)
        image.name = node.name
        if hasattr(node, "_dynamo_source"):
            image._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
        self.images[node] = image

    def keep(self, nodes: Sequence[fx.Node]) -> None:
        """Have the wiring run ``nodes`` itself."""
        for node in nodes:
            self._copy(node)

    def call_region(self, nodes: Sequence[fx.Node]) -> None:
        """Make a region of ``nodes`` and call it; its outputs are the values that are read outside of it."""
        members = set(nodes)
        outputs = [node for node in nodes if any(user not in members for user in node.users)]
        read = [source for node in nodes for source in node.all_input_nodes if source not in members]
        inputs = list(dict.fromkeys([*read, *symbols_of(read, self.symbols, nodes)]))
        unknown = next((source.name for source in inputs if fake_value(source) is None), None)
        if unknown is not None:  # a graph within the graph, as flex_attention calls them
            raise PassError(
                f"cannot cut the graph at its sublayers: {unknown} is no value that a region could be given"
            )
        extracted = _extracted(self.source, nodes, inputs, outputs)
        region = Region(f"region_{self.regions}", extracted, self.distinct)
        self.regions += 1
        self.distinct.setdefault(region.key, region)
        call = self.graph.call_function(region, tuple(self.images[source] for source in inputs))
        call.meta["example_value"] = tuple(fake_value(node) for node in outputs)
        for node in nodes:
            self.calls[node] = call
        for place, node in enumerate(outputs):
            image = self.graph.create_node("call_function", operator.getitem, (call, place), name=node.name)
            image.meta = dict(node.meta)
            self.images[node] = image

    def finish(self) -> None:
        """Return from the wiring what the source returns."""
        output = self.source.graph.output_node()
        self.graph.output(fx.node.map_arg(output.args[0], self.images.__getitem__))

    def outlined(self, sublayer: Sublayer) -> Sublayer:
        """Return what a sublayer of the source is in the wiring: the call of its region."""
        call = self.calls[sublayer.stream_out]
        end = self.images[sublayer.stream_out]
        return replace(
            sublayer,
            stream_in=self.images[sublayer.stream_in],
            stream_out=end,
            branch=call,
            nodes=(call, end),
            writes=(call,) if sublayer.writes else (),
            cache_inputs=tuple(self.images[node] for node in sublayer.cache_inputs),
        )


def _extracted(
    source: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    images: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        images[node] = graph.placeholder(node.name)
        images[node].meta = dict(node.meta)
    for node in nodes:
        images[node] = graph.node_copy(node, images.__getitem__)
    for node, image in images.items():
        image.name = node.name  # of an input too: left to itself, a graph calls X x
    graph.output(tuple(images[node] for node in outputs))
    return graph_module(source, graph)
