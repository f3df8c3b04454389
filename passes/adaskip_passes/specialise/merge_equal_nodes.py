"""Compute once what is computed again and again in the same way, where that is sure to make no difference.

What all layers share, such as the cosines of positions, is often viewed anew in each of them, and each cache begins with
an empty tensor of its own. Such views are the same memory in the same form, and there is nothing in an empty tensor; so
one stands for all, and what stands before the first sublayer gets several times shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream

# They never copy, so what is written through one is seen through all.
_VIEWS = frozenset("expand getitem narrow permute select squeeze transpose unflatten unsqueeze view".split())


@dataclass(frozen=True)
class MergeEqualNodes:
    """Replace each view by an earlier one of the same tensor with the same arguments, and empty tensors alike.

    Outside of sublayers alone: inside, a node goes with its sublayer when that is skipped.

    >>> from adaskip_passes.ir.printer import print_graph
    >>> gm = fx.symbolic_trace(lambda x: torch.unsqueeze(x, 0) * torch.unsqueeze(x, 0) + x.unsqueeze(1))
    >>> for node in gm.graph.nodes:
    ...     node.meta["example_value"] = torch.empty(2)
    >>> MergeEqualNodes().apply(gm, ResidualStream(())).matched
    1
    >>> print(print_graph(gm))
    %x: f32[2] = placeholder
    %unsqueeze: f32[2] = torch.unsqueeze(%x, 0)
    %mul: f32[2] = operator.mul(%unsqueeze, %unsqueeze)
    %unsqueeze_2: f32[2] = .unsqueeze(%x, 1)
    %add: f32[2] = operator.add(%mul, %unsqueeze_2)
    output(%add)
    """

    name: ClassVar[str] = "merge-equal-nodes"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Merge equal nodes of ``gm``; ``matched`` counts those that went."""
        kept = {node for one in stream.sublayers for node in (*one.nodes, one.stream_in)}
        kept.update(gm.graph.output_node().all_input_nodes)
        first: dict[Any, fx.Node] = {}
        merged = 0
        for node in list(gm.graph.nodes):
            if node in kept or not (_is_view(node) or _is_empty(node)):
                continue
            # Arguments may be slices, which have no hash.
            same = first.setdefault((node.op, node.target, repr((node.args, node.kwargs))), node)
            if same is not node:
                node.replace_all_uses_with(same)
                gm.graph.erase_node(node)
                merged += 1
        return PassResult(stream, bool(merged), merged)


def _is_view(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or op_name(node) not in _VIEWS:
        return False
    # An item of a tuple is no view, and an index that is a tensor makes a copy.
    tensors = [isinstance(fake_value(one), torch.Tensor) for one in node.all_input_nodes]
    return tensors[:1] == [True] and not any(tensors[1:])


def _is_empty(node: fx.Node) -> bool:
    value = fake_tensor(node)
    return node.op == "call_function" and not node.all_input_nodes and value is not None and 0 in value.shape
