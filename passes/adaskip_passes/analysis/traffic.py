"""How many bytes the nodes of a region move, as expressions of their symbolic shapes.

Each op is taken on its own: it reads its inputs and writes its output once. Views are free, in-place
writes touch only what they write. Parameters are apart, since a region reads each of them once however
many tokens it runs on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import sympy
import torch
from torch import fx

from adaskip_passes.analysis.effects import Effects
from adaskip_passes.analysis.flops import shape_of, sizes_product
from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name
from adaskip_passes.ir.module_paths import held_by_module, tensors_behind

__all__ = ["Traffic"]

_ZERO = sympy.Integer(0)
_GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


class Traffic:
    """The bytes that regions of one graph move and hold; ``appended`` maps appends in place to what they append."""

    def __init__(self, gm: fx.GraphModule, effects: Effects, appended: Mapping[fx.Node, fx.Node]) -> None:
        self._effects, self._written, self._appended = effects, effects.written(), appended
        self._parameters = tensors_behind(gm.graph)
        self._outputs = gm.graph.output_node().all_input_nodes

    def weights(self, nodes: Iterable[fx.Node]) -> sympy.Expr:
        """Return the bytes of the parameters that ``nodes`` read, each parameter once.

        Of a table only rows are read, which count as activations; of grouped experts at most one a row.
        """
        read: dict[fx.Node, sympy.Expr] = {}
        for node in nodes:
            if op_name(node) == "embedding":
                continue
            for source in node.all_input_nodes:
                for parameter in self._parameters.get(source, ()):
                    read[parameter] = _bytes(parameter) * _share_of_experts(node, parameter)
        return sympy.Add(*read.values())

    def activations(self, nodes: Iterable[fx.Node]) -> sympy.Expr:
        """Return the bytes that ``nodes`` read and write beside parameters."""
        return sympy.Add(*(self._moved(node) for node in nodes))

    def caches(self, nodes: Collection[fx.Node], stream_out: fx.Node) -> sympy.Expr:
        """Return the bytes of the cache tensors that ``nodes`` fill: written buffers and values handed out."""
        held: dict[fx.Node, sympy.Expr] = {}
        region = set(nodes)
        for node in self._outputs:
            if node in region and node is not stream_out and shape_of(node):
                held[self._effects.roots[node]] = _bytes(node)
        outlives = {self._effects.roots[node] for node in self._outputs}
        for write in self._effects.writes:
            root = write.root
            stays = root in outlives or (root.op == "placeholder" and not held_by_module(root))
            if write.node in region and stays and shape_of(root):
                held.setdefault(root, _bytes(root))
        return sympy.Add(*held.values())

    def _moved(self, node: fx.Node) -> sympy.Expr:
        if node.op in ("placeholder", "output", "get_attr"):
            return _ZERO
        if node in self._appended:
            return 2 * _bytes(self._appended[node])
        inputs = [source for source in node.all_input_nodes if source not in self._parameters]
        written = self._written.get(node, ())
        if written:
            sources = [source for source in inputs if self._effects.roots[source] not in written]
            return 2 * sympy.Add(*map(_bytes, sources or inputs))
        if self._is_view(node):
            return _ZERO
        return sympy.Add(_bytes(node), *map(_bytes, inputs))

    def _is_view(self, node: fx.Node) -> bool:
        if self._effects.roots[node] is node:
            return False
        before, after = fake_tensor(node.args[0]), fake_tensor(node)
        if before is None or after is None:
            return True
        picks_rows = op_name(node) == "getitem" and any(
            fake_tensor(source) is not None for source in node.all_input_nodes[1:]
        )
        return before.dtype == after.dtype and not picks_rows


def _share_of_experts(node: fx.Node, parameter: fx.Node) -> sympy.Expr:
    """Return which share of a parameter ``node`` reads: rows / experts where each row meets one expert of many."""
    experts, rows = shape_of(parameter), shape_of(node)
    if op_name(node) not in _GROUPED or len(experts) != 3 or not rows:
        return sympy.Integer(1)
    return sympy.Min(experts[0], rows[0]) / experts[0]


def _bytes(node: fx.Node) -> sympy.Expr:
    """Return the bytes of a node's tensor, or of the tensors in its tuple."""
    value = fake_value(node)
    tensors = value if isinstance(value, (tuple, list)) else [value]
    sizes = (
        tensor.dtype.itemsize * sizes_product(shape_of(tensor))
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    )
    return sympy.Add(*sizes)
