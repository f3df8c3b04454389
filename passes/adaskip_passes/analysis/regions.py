"""Regions: the parts of a cut graph that its wiring calls, and what two must agree in to share one compiled artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.analysis.effects import positions_written
from adaskip_passes.ir.graph import fake_tensor, fake_value


class Region:
    """One region: a function of what it reads, which the wiring calls.

    ``key`` is a text that is equal for regions that compute the same: same ops, shapes, strides, symbols,
    dtypes and devices. ``written_inputs`` are the positions of the inputs that it writes to.
    """

    def __init__(self, name: str, gm: fx.GraphModule, equals: Mapping[str, Region] | None = None) -> None:
        """Take from ``equals``, regions by their keys, what is known of an equal one."""
        self.__name__, self.gm, self.key = name, gm, region_key(gm)
        equal = (equals or {}).get(self.key)
        self.written_inputs = positions_written(gm) if equal is None else equal.written_inputs

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the region node by node."""
        return self.gm.forward(*inputs)


def regions_of(gm: fx.GraphModule) -> tuple[Region, ...]:
    """Return the regions that ``gm`` calls, in order."""
    return tuple(node.target for node in gm.graph.nodes if isinstance(node.target, Region))


def symbol_inputs(graph: fx.Graph) -> dict[sympy.Symbol, fx.Node]:
    """Return the inputs of ``graph`` that give the symbols of its shapes, as inner compilers want them beside tensors."""
    found: dict[sympy.Symbol, fx.Node] = {}
    for node in graph.nodes:
        value = fake_value(node) if node.op in ("placeholder", "get_attr") else None
        # Inner compilers take a number for the symbol that it was made with, and a size for the one that has
        # since been found equal to it: the two differ.
        if isinstance(value, torch.SymInt) and value.node._expr.is_Symbol:
            found.setdefault(value.node._expr, node)
    # A symbol that no input gives by itself is given by a tensor that has it as a size.
    for node in graph.find_nodes(op="placeholder"):
        value = fake_tensor(node)
        for size in () if value is None else value.shape:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, node)
    return found


def symbols_of(
    inputs: Iterable[fx.Node], given: Mapping[sympy.Symbol, fx.Node], inside: Iterable[fx.Node] = ()
) -> Iterator[fx.Node]:
    """Yield the nodes of ``given`` (:func:`symbol_inputs`) that a region of the nodes ``inside`` needs beside ``inputs``.

    They give the symbols in the values of both. A number among ``inputs`` gives but the symbol that it was made
    with: sizes made of it may be in terms of another one, found equal since.
    """
    inputs = list(inputs)
    numbers = {value.node._expr for node in inputs if isinstance(value := fake_value(node), torch.SymInt)}
    # In order of appearance, not of names, so that equal regions take them in the same order.
    found = dict.fromkeys(symbol for node in (*inputs, *inside) for symbol in _symbols(fake_value(node)))
    yield from (given[symbol] for symbol in found if symbol in given and symbol not in numbers)


def _symbols(value: Any) -> Iterator[sympy.Symbol]:
    """Yield the symbols in a value, those that it was made with and those that stand for them now, but for constants."""
    if isinstance(value, torch.Tensor):
        value = (*value.shape, *value.stride(), value.storage_offset())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _symbols(item)
    elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        env = value.node.shape_env
        for expression in (value.node._expr, value.node.expr):
            yield from (one for one in sorted(expression.free_symbols, key=str) if not env.replace(one).is_number)


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
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
    # Functions that were made by a function, and lambdas, share their names.
    return f"{name}@{id(target):x}" if "<" in name else name


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
