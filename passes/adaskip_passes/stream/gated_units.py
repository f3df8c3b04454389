"""Find the units of a gated FFN: what each computes of the stream, and where it adds to the branch.

A unit j of a gated FFN is a row of two matrices and a column of a third one::

    branch = down @ (act(gate @ x) * (up @ x))         x: the stream, normed
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from adaskip_passes.ir.graph import LINEAR_ARGUMENTS, fake_tensor, named_arguments, op_name
from adaskip_passes.stream.stream import Sublayer


@dataclass(frozen=True)
class GatedUnits:
    """Where a graph computes them: ``normed`` is x, ``hidden`` what ``down`` is multiplied by.

    ``gate``, ``up`` and ``down`` are the nodes of the matrices, ``(units, d)`` twice and ``(d, units)``.
    """

    normed: fx.Node
    hidden: fx.Node
    gate: fx.Node
    up: fx.Node
    down: fx.Node


def find_gated_units(sublayer: Sublayer) -> GatedUnits | None:
    """Return the units of ``sublayer``; None where it is no FFN of that form (experts, no gate, packed weights)."""
    width = _width(sublayer.stream_in)
    linears = [node for node in sublayer.nodes if op_name(node) == "linear" and _weight(node) is not None]
    if sublayer.stateful or width is None or len(linears) != 3:
        return None
    first, second, last = linears
    down = _weight(last)
    hidden = named_arguments(last, LINEAR_ARGUMENTS)["input"]
    normed = named_arguments(first, LINEAR_ARGUMENTS)["input"]
    if down is None or normed is not named_arguments(second, LINEAR_ARGUMENTS)["input"] or _width(normed) != width:
        return None
    if not isinstance(hidden, fx.Node) or op_name(hidden) != "mul" or _width(last) != width:
        return None
    for one, other in ((first, second), (second, first)):
        gate, up = _weight(one), _weight(other)
        # The gate goes through an activation on its way to the product, the other one does not.
        if (
            other in hidden.all_input_nodes
            and one not in hidden.all_input_nodes
            and gate is not None
            and up is not None
        ):
            return GatedUnits(normed, hidden, gate, up, down)
    return None


def computed_before(sublayer: Sublayer, end: fx.Node) -> list[fx.Node] | None:
    """Return what is computed of the stream and of inputs for ``end``, a node of ``sublayer``, in order, and ``end``.

    None where it takes what was computed of tokens before: another value of the stream, or a mask.
    """
    inside, needed = {*sublayer.nodes}, {end}
    for node in reversed(sublayer.stream_in.graph.nodes):
        if node in needed and node is not sublayer.stream_in:
            needed.update(node.all_input_nodes)
    chosen = [
        node
        for node in end.graph.nodes
        if node in needed and node.op != "placeholder" and node is not sublayer.stream_in
    ]
    return chosen if all(node in inside or _of_fixed_size(node) for node in chosen) else None


def _of_fixed_size(node: fx.Node) -> bool:
    """Whether it is computed of weights and numbers: what is computed of tokens has as many rows as there are."""
    value = fake_tensor(node)
    return value is None or all(isinstance(size, int) for size in value.shape)


def _weight(node: fx.Node) -> fx.Node | None:
    """Return the input that is the matrix of a linear call without a bias; None for any other."""
    given = named_arguments(node, LINEAR_ARGUMENTS)
    weight = given.get("weight")
    plain = isinstance(weight, fx.Node) and weight.op == "placeholder" and given.get("bias") is None
    return weight if plain else None


def _width(node: object) -> int | None:
    value = fake_tensor(node)
    return int(value.shape[-1]) if value is not None and isinstance(value.shape[-1], int) else None
