"""Cut a graph into a chain of regions, so that equal sublayers can share one compiled artifact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from adaskip_passes.graph import ADDED_BY, LEFT_BY, fake_value
from adaskip_passes.residual_stream import ResidualStream


@dataclass(frozen=True)
class OutlinedGraph:
    """A graph cut into regions.

    ``gm`` calls one submodule a region, in the order of the original graph. ``keys`` maps the name of
    each region worth compiling to a text that is equal for regions that compute the same: same ops,
    shapes, strides, symbols, dtypes and devices. Names not in it hold a few views or scalings.
    """

    gm: fx.GraphModule
    keys: dict[str, str]


def outline_regions(gm: fx.GraphModule, stream: ResidualStream) -> OutlinedGraph:
    """Cut ``gm`` after each residual add of ``stream``, and around skipped sublayers and probes.

    ``gm`` is left as it is. Weights, cache tensors and scales become inputs of their regions.
    """
    parts = dict(_partition(gm, stream))
    outlined = split_module(gm, gm, lambda node: parts[node][0], keep_original_order=True)
    _sort_outputs(outlined)
    compiled = {f"submod_{number}" for number, heavy in parts.values() if heavy}
    keys = {
        name: region_key(region)
        for name, region in outlined.named_children()
        if name in compiled and isinstance(region, fx.GraphModule)
    }
    return OutlinedGraph(outlined, keys)


def _partition(gm: fx.GraphModule, stream: ResidualStream) -> Iterator[tuple[fx.Node, tuple[int, bool]]]:
    """Yield each computing node with the number of its part, and whether the part is worth compiling."""
    ends = {sublayer.stream_out for sublayer in stream.kept}
    first = _start_of_first_sublayer(gm, stream)
    number, was_heavy = 0, True
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        heavy = ADDED_BY not in node.meta and LEFT_BY not in node.meta
        if heavy != was_heavy or node is first:
            number, was_heavy = number + 1, heavy
        yield node, (number, heavy)
        if node in ends:
            number += 1


def _start_of_first_sublayer(gm: fx.GraphModule, stream: ResidualStream) -> fx.Node:
    inside = set(stream.sublayers[0].nodes)
    return next(node for node in gm.graph.nodes if node in inside or node is stream.sublayers[0].stream_out)


def _sort_outputs(wiring: fx.GraphModule) -> None:
    """Have each region return its values in the order in which it computes them.

    ``split_module`` returns them in the order in which they are first used, which differs from one skip
    set to the next.
    """
    for node in wiring.graph.nodes:
        region = wiring.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(region, fx.GraphModule) or not isinstance(
            values := region.graph.output_node().args[0], tuple
        ):
            continue
        position = {inner: index for index, inner in enumerate(region.graph.nodes)}
        order = sorted(range(len(values)), key=lambda index: position[values[index]])
        region.graph.output_node().args = (tuple(values[index] for index in order),)
        region.recompile()
        for user in tuple(node.users):
            user.args = (node, order.index(user.args[1]))
    wiring.recompile()


def region_key(region: fx.GraphModule) -> str:
    """Return a text that two regions of one capture share exactly when one's compiled code serves the other.

    Symbols are renamed in order of appearance, and come with the range that they are known to lie in:
    where each layer's cache has a length of its own, equal layers are still equal.
    """
    number: dict[fx.Node, int] = {}
    symbols: dict[str, str] = {}
    lines = []
    for node in region.graph.nodes:
        args = fx.node.map_arg((node.args, node.kwargs), lambda source: _Reference(number[source]))  # type: ignore[arg-type]
        target = "" if node.op in ("placeholder", "output") else _target_text(node.target)
        number[node] = len(number)
        lines.append(f"{node.op} {target} {args} : {_value_text(fake_value(node), symbols)}")
    return "\n".join([*lines, *symbols.values()])


class _Reference:
    """A node in the text of a key, by its position."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _target_text(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _value_text(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ",".join(_value_text(size, symbols) for size in (*value.shape, *value.stride()))
        return f"{value.dtype}[{sizes}]{value.device}"
    if isinstance(value, (tuple, list)):
        return ",".join(_value_text(item, symbols) for item in value)
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__} {value}"
    expression = value.node.expr
    if expression.is_Integer:
        return f"int {expression}"  # a symbol that has been found to be a constant
    renamed = {}
    for symbol in sorted(expression.free_symbols, key=lambda symbol: (symbol.name not in symbols, symbol.name)):
        if symbol.name not in symbols:
            known = value.node.shape_env.var_to_range.get(symbol)
            symbols[symbol.name] = f"x{len(symbols)} in {known}"
        renamed[symbol] = sympy.Symbol(symbols[symbol.name].partition(" ")[0])
    return str(expression.xreplace(renamed))
