"""Products of one row with a matrix of weights, written so that a CPU reads the weights at the speed of memory.

Decoding one token multiplies single rows by matrices: two operations a weight, so reading the weights is
all the time that it takes. Matrix libraries are built for many rows; at one row they reach a third to a half of
the memory's bandwidth. ``linear`` keeps a weight as ``(out, in)``, which is just the order in which a sum
over products wants to read it::

    %y = linear(%x, %w)        %p = mul(%x, %w)        f32[out, in], never stored
                               %y = sum(%p, -1)        f32[out]

An inner compiler makes one loop of the two, and one kernel of it and what stands before and after. No
weight is packed or copied, so none is held twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from adaskip_passes.ir.graph import LINEAR_ARGUMENTS, call, fake_tensor, named_arguments, tensor_of
from adaskip_passes.ir.plain_tensors import is_plain
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class DecomposeOneRowLinear:
    """Spell out the one-row ``linear`` calls on the CPU.

    Products of 16-bit floats are summed in 32 bits, as ``linear`` does.
    """

    name: ClassVar[str] = "decompose-one-row-linear"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        found = [node for node in gm.graph.nodes if _is_one_row_linear(node)]
        replaced: dict[fx.Node, fx.Node] = {}
        for node in found:
            with gm.graph.inserting_before(node):
                replaced[node] = _spelled_out(gm.graph, *_operands(node))
            node.replace_all_uses_with(replaced[node])
            gm.graph.erase_node(node)
        return PassResult(stream.mapped(lambda node: replaced.get(node, node)), bool(found), len(found))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    given = named_arguments(node, LINEAR_ARGUMENTS)
    return given["input"], given["weight"], given.get("bias")


def _is_one_row_linear(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    x, weight, _ = map(fake_tensor, _operands(node))
    result = fake_tensor(node)
    if x is None or weight is None or weight.dim() != 2 or x.device.type != "cpu":
        return False
    if not is_plain(x) or not is_plain(weight):
        return False
    if result is None or result.dtype != x.dtype:  # autocast has it computed in other numbers than it is given
        return False
    rows = x.shape[:-1]
    return all(isinstance(size, int) for size in rows) and math.prod(rows) == 1 and x.dtype == weight.dtype


def _spelled_out(graph: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    row, matrix = tensor_of(x), tensor_of(weight)
    flat = call(graph, "reshape", x, (row.shape[-1],))
    if row.dtype.itemsize < 4:
        flat, weight = call(graph, "float", flat), call(graph, "float", weight)
    product = call(graph, "sum", call(graph, torch.mul, flat, weight), -1)
    if bias is not None:
        product = call(graph, torch.add, product, bias)
    if row.dtype.itemsize < 4:
        product = call(graph, "to", product, row.dtype)
    return call(graph, "reshape", product, (*row.shape[:-1], matrix.shape[0]))
