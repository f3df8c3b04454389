"""Run the wiring of a variant: a list of calls over numbered slots, so that a new skip set generates no code."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_passes.analysis.regions import Region


@dataclass(frozen=True)
class _Step:
    """Call ``function`` with the values in the slots ``arguments``; keep its result, or items of it; forget ``done``."""

    function: Callable[..., Any]
    arguments: tuple[int, ...]
    result: int | None
    items: tuple[tuple[int, int], ...]  # (place in the result, slot)
    done: tuple[int, ...]


class Executor:
    """Computes what a wiring computes, with the same inputs in order; ``compiled`` gives the code of each region."""

    def __init__(self, gm: fx.GraphModule, compiled: Mapping[Region, Callable[..., Any]]) -> None:
        inputs = gm.graph.find_nodes(op="placeholder")  # they come first; other nodes may lie between them
        others = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
        # Not kept: nodes hold their graph, and a process makes many variants.
        slots = {node: slot for slot, node in enumerate([*inputs, *others])}
        self._held = [(slots[node], _attribute(gm, node)) for node in gm.graph.find_nodes(op="get_attr")]
        last_user = {source: node for node in gm.graph.nodes for source in node.all_input_nodes}
        done: dict[fx.Node, list[int]] = {}
        for source, user in last_user.items():
            done.setdefault(user, []).append(slots[source])
        self._steps = [
            _step(node, slots, compiled, tuple(done.get(node, ())))
            for node in gm.graph.nodes
            if node.op in ("call_function", "call_method") and not _is_item_of_region(node)
        ]
        self._results = tuple(
            (slots[value], None) if isinstance(value, fx.Node) else (None, value)
            for value in gm.graph.output_node().args[0]  # type: ignore[union-attr]
        )
        self._size = len(slots)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run all steps; values are forgotten as soon as no later step reads them."""
        values = [*inputs, *[None] * (self._size - len(inputs))]
        for slot, value in self._held:
            values[slot] = value
        for step in self._steps:
            result = step.function(*[values[slot] for slot in step.arguments])
            if step.result is not None:
                values[step.result] = result
            for place, slot in step.items:
                values[slot] = result[place]
            for slot in step.done:
                values[slot] = None
        return tuple(constant if slot is None else values[slot] for slot, constant in self._results)


def _step(
    node: fx.Node, slots: Mapping[fx.Node, int], compiled: Mapping[Region, Callable[..., Any]], done: tuple[int, ...]
) -> _Step:
    def places(nodes: Sequence[Any]) -> tuple[int, ...]:
        return tuple(slots[one] for one in nodes)

    if isinstance(node.target, Region):
        items = tuple((int(user.args[1]), slots[user]) for user in node.users)  # type: ignore[arg-type]
        return _Step(compiled[node.target], places(node.args), None, items, done)
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    if not all(isinstance(value, fx.Node) for value in node.args) or node.kwargs:
        return _Step(_with_constants(function, node), places(node.all_input_nodes), slots[node], (), done)
    return _Step(function, places(node.args), slots[node], (), done)


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(gm)


def _is_item_of_region(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and isinstance(source.target, Region)


def _with_constants(function: Callable[..., Any], node: fx.Node) -> Callable[..., Any]:
    """Return a function of the nodes that ``node`` reads, in order; its other arguments are constants."""
    if not node.kwargs and not any(isinstance(value, (tuple, list, slice)) for value in node.args):
        return _with_flat_constants(function, node)
    places = {source: place for place, source in enumerate(node.all_input_nodes)}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _Place(places[source]))  # type: ignore[arg-type,return-value]

    def call(*values: Any) -> Any:
        def fill(item: Any) -> Any:
            return values[item.number] if isinstance(item, _Place) else item

        return function(*fx.node.map_aggregate(args, fill), **fx.node.map_aggregate(kwargs, fill))

    return call


def _with_flat_constants(function: Callable[..., Any], node: fx.Node) -> Callable[..., Any]:
    """Return the same for arguments without tuples in them, filled in an order of magnitude faster."""
    number = {source: place for place, source in enumerate(node.all_input_nodes)}
    template = [None if isinstance(value, fx.Node) else value for value in node.args]
    filled = [(place, number[value]) for place, value in enumerate(node.args) if isinstance(value, fx.Node)]

    def call(*values: Any) -> Any:
        args = template.copy()
        for place, source in filled:
            args[place] = values[source]
        return function(*args)

    return call


class _Place:
    """Stands for an argument that is only known when the call is made."""

    def __init__(self, number: int) -> None:
        self.number = number
