"""Bring a captured graph into the form that the analyses and passes read best. No value changes but by rounding.

Three rewrites, before anything is read of the stream:

* Parallel branches are added one after the other, each onto the stream so far, so that every sublayer
  has a value of the stream before it and one after it::

      %s = add(%attention, %ffn)        %p = add(%x, %attention)
      %b = add(%s, %x)                  %b = add(%p, %ffn)

* What is added to or multiplied with the stream in place, is so out of place, so that a value of the
  stream stays what it was::

      %b = iadd(%x, %ffn)               %b = add(%x, %ffn)

* Dropouts that drop nothing go.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.ir.graph import call, fake_tensor, fake_value, op_name
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.add_trees import leaves_of
from adaskip_passes.stream.chain import Link, find_chain, straight_sums
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream

_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    "add_": "add",
    "mul_": "mul",
    "div_": "div",
}


@dataclass(frozen=True)
class StraightenStream:
    """Bring the residual stream into its straight form, and find it: what runs first needs no stream, what runs later does.

    Graphs without a single stream keep their adds. A second run changes nothing.
    """

    name: ClassVar[str] = "straighten-stream"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place; what matches are nodes that are rewritten or removed."""
        changed = _without_dropout(gm) + _out_of_place(gm)
        dependence = Dependence(gm, find_effects(gm))
        for link in find_chain(gm, dependence).links:
            if straight_sums(link) is None:
                _add_in_turn(gm.graph, link, dependence)
                changed += 1
        return PassResult(find_residual_stream(gm), bool(changed), changed)


def _without_dropout(gm: fx.GraphModule) -> int:
    """Remove the dropouts that drop nothing, so that they do not stand between the adds of a tree."""
    idle = [node for node in gm.graph.nodes if _is_idle_dropout(node)]
    for node in idle:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    return len(idle)


def _is_idle_dropout(node: fx.Node) -> bool:
    if op_name(node) != "dropout" or node.op != "call_function" or not node.args:
        return False
    rest = dict(zip(("p", "training", "inplace"), node.args[1:], strict=False)) | node.kwargs
    return rest.get("training", True) is False or rest.get("p") in (0, 0.0)


def _out_of_place(gm: fx.GraphModule) -> int:
    """Give sums and products of the stream's rank memory of their own, where nothing reads the old value later."""
    effects = find_effects(gm)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    last_read: dict[fx.Node, int] = {}  # by root: the last reader of a name that has been met
    changed = 0
    for node in gm.graph.nodes:
        root = effects.roots[node]
        in_place = node.target in _OUT_OF_PLACE and _like_a_stream(node, root)
        if in_place and last_read[root] <= order[node]:
            node.target = _OUT_OF_PLACE[node.target]
            changed += 1
        last_read[root] = max([last_read.get(root, -1), *(order[user] for user in node.users)])
    return changed


def _like_a_stream(node: fx.Node, root: fx.Node) -> bool:
    value = fake_tensor(node)
    if value is None or value.dim() not in (2, 3) or root.op in ("placeholder", "get_attr"):
        return False
    operands: list[Any] = [fake_value(item) if isinstance(item, fx.Node) else item for item in node.args[:2]]
    return value.is_floating_point() and torch.result_type(*operands) == value.dtype


def _add_in_turn(graph: fx.Graph, link: Link, dependence: Dependence) -> None:
    """Let the add of ``link`` join the last part only, and add the others before, each as soon as it is there.

    A branch that is written in place is there when the add would find it so.
    """
    add, inner = link.tree.add, _inner_adds(link.tree.add)
    order = {node: index for index, node in enumerate(graph.nodes)}
    total = latest = link.tree.leaf
    for part in link.parts[:-1]:
        contributed = _sum(graph, add, part.branches)
        written = [node for branch in part.branches for node in dependence.written_since(branch, add)]
        latest = max(latest, *part.branches, *written, key=order.__getitem__)
        with graph.inserting_after(latest) if contributed in order else graph.inserting_before(add):
            total = call(graph, torch.add, total, contributed)
        order[total], latest = order[latest], total
    add.op, add.target, add.kwargs = "call_function", torch.add, dict[str, Any]()
    add.args = (total, _sum(graph, add, link.parts[-1].branches))
    for node in inner:
        graph.erase_node(node)


def _sum(graph: fx.Graph, before: fx.Node, branches: Iterable[fx.Node]) -> fx.Node:
    first, *others = branches
    with graph.inserting_before(before):
        for other in others:
            first = call(graph, torch.add, first, other)
    return first


def _inner_adds(add: fx.Node) -> list[fx.Node]:
    """Return the adds of the tree below ``add``, each before its operands."""
    found: list[fx.Node] = []
    for operand in add.args[:2]:
        assert isinstance(operand, fx.Node)
        if list(leaves_of(operand)) != [operand]:
            found += [operand, *_inner_adds(operand)]
    return found
