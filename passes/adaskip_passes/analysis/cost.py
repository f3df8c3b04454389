"""What each sublayer costs, as expressions in batch ``b``, query length ``q`` and context length ``t``.

The expressions are read from the graph: shapes of its fake tensors give sizes, and the graph's own
symbols are renamed by where they occur. The first two sizes of the stream are ``b`` and ``q``; ``t`` is
all tokens that a query may see, cached and new. Where the cache is given as the tokens so far, its
length is ``t - q``; where it is a buffer that the graph writes into, its length is ``t`` itself,
since attention then runs over the whole buffer. Every other open size (a window that is full, the
state of a recurrence) counts at its value when the graph was captured.

>>> from sympy import symbols
>>> b, q, t = symbols("b q t", integer=True, positive=True)
>>> print(Cost(flops=8 * b * q * t, weight_bytes=sympy.Integer(64), activation_bytes=4 * b * q).at(b=1, q=2, t=3))
48 flops, 64 weight bytes, 8 activation bytes, 0 cache bytes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from adaskip_passes.analysis.effects import Effects, find_effects
from adaskip_passes.analysis.flops import count_flops, shape_of
from adaskip_passes.analysis.traffic import Traffic
from adaskip_passes.errors import OptionError
from adaskip_passes.ir.graph import fake_tensor, fake_value
from adaskip_passes.ir.module_paths import held_by_module

__all__ = ["Cost", "CostTable", "find_costs"]

B, Q, T = sympy.symbols("b q t", integer=True, positive=True)
_ZERO = sympy.Integer(0)


class StreamLike(Protocol):
    """What of a residual stream the cost analysis reads."""

    @property
    def sublayers(self) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a sublayer, each part an expression in ``b``, ``q`` and ``t``.

    ``flops`` counts matrix products (:mod:`adaskip_passes.analysis.flops`). ``weight_bytes`` are the parameters
    read, each once; of a mixture of experts at most one expert a routed row. ``activation_bytes`` are
    what its ops read and write otherwise, cached keys and values included, each op on its own: views are
    free, and no fusion is assumed. ``cache_bytes`` is the memory that its cache holds after the run.
    """

    flops: sympy.Expr = _ZERO
    weight_bytes: sympy.Expr = _ZERO
    activation_bytes: sympy.Expr = _ZERO
    cache_bytes: sympy.Expr = _ZERO

    def at(self, *, b: int = 1, q: int = 1, t: int | None = None) -> Cost:
        """Return the cost for batch ``b``, ``q`` query tokens and ``t`` context tokens (default ``q``), as numbers."""
        sizes = {B: b, Q: q, T: q if t is None else t}
        return Cost(
            *(part.xreplace({key: sympy.Integer(size) for key, size in sizes.items()}) for part in self.parts())
        )

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(one + two for one, two in zip(self.parts(), other.parts(), strict=True)))

    def __str__(self) -> str:
        return ", ".join(
            f"{part} {field.name.replace('_', ' ')}" for field, part in zip(fields(self), self.parts(), strict=True)
        )

    def parts(self) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr, sympy.Expr]:
        """Return flops, weight, activation and cache bytes, in this order."""
        return (self.flops, self.weight_bytes, self.activation_bytes, self.cache_bytes)


@dataclass(frozen=True)
class CostTable(Mapping[str, Cost]):
    """The cost of each sublayer by path, in stream order.

    ``fixed`` holds the sizes that the graph does not leave open: a decode graph has ``q`` = 1, and one
    that is given no cache has ``t`` = ``q``.
    """

    costs: Mapping[str, Cost]
    fixed: Mapping[str, sympy.Expr]

    def at(self, *, b: int = 1, q: int = 1, t: int | None = None) -> CostTable:
        """Return the table in numbers; :class:`OptionError` where the graph is specialised to another size."""
        asked = {B: b, Q: q, T: q if t is None else t}
        for symbol, size in asked.items():
            known = self.fixed.get(symbol.name, symbol)
            if known.xreplace({Q: sympy.Integer(q)}) not in (size, symbol):
                raise OptionError(
                    f"this graph was captured with {symbol} = {known} and has no cost at {symbol} = {size}"
                )
        return CostTable({path: cost.at(b=b, q=q, t=t) for path, cost in self.costs.items()}, self.fixed)

    @property
    def total(self) -> Cost:
        """The sum over all sublayers; embedding, final norm and head are no sublayers."""
        return sum(self.costs.values(), start=Cost())

    def __getitem__(self, path: str) -> Cost:
        return self.costs[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.costs)

    def __len__(self) -> int:
        return len(self.costs)

    def __str__(self) -> str:
        rows = [("sublayer", *(field.name.replace("_", " ") for field in fields(Cost)))]
        rows += [(path, *(str(part) for part in cost.parts())) for path, cost in self.costs.items()]
        rows.append(("total", *(str(part) for part in self.total.parts())))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def find_costs(gm: fx.GraphModule, stream: StreamLike, appended: Mapping[fx.Node, fx.Node] | None = None) -> CostTable:
    """Return what each sublayer of ``stream`` costs, read from the shapes in ``gm``. Never mutates it.

    ``appended`` maps each concatenation that will append to a cache entry in place to what it appends
    (:mod:`adaskip_passes.specialise.append_in_place`): it moves that alone.
    """
    if not stream.sublayers:
        return CostTable({}, {})
    effects = find_effects(gm)
    traffic = Traffic(gm, effects, appended or {})
    sizes = _Sizes(gm, stream, effects)
    costs = {}
    for sublayer in stream.sublayers:
        cost = Cost(
            flops=sympy.Add(*map(count_flops, sublayer.nodes)),
            weight_bytes=traffic.weights(sublayer.nodes),
            activation_bytes=traffic.activations(sublayer.nodes),
            cache_bytes=traffic.caches(sublayer.nodes, sublayer.stream_out),
        )
        costs[sublayer.path] = sizes.rename(cost)
    return CostTable(costs, sizes.fixed)


class _Sizes:
    """What the symbols of a graph mean in ``b``, ``q`` and ``t``."""

    def __init__(self, gm: fx.GraphModule, stream: StreamLike, effects: Effects) -> None:
        self._meaning: dict[sympy.Basic, sympy.Expr] = {}
        self.fixed: dict[str, sympy.Expr] = {}
        # A stream without a batch dimension is (tokens, width).
        for size, name in zip(reversed(shape_of(stream.sublayers[0].stream_in)[:-1]), (Q, B), strict=False):
            if size.is_Integer:
                self.fixed[name.name] = size
            elif size.is_Symbol:
                self._meaning[size] = name
        attention = [node for sublayer in stream.sublayers if sublayer.kind == "attention" for node in sublayer.nodes]
        cached = self._mean_buffers(attention, effects) | self._mean_growing(attention, effects)
        if not cached:
            self.fixed[T.name] = Q
        self._mean(
            {
                symbol: sympy.Integer(length)
                for symbol, length in _lengths(gm.graph.find_nodes(op="placeholder")).items()
            }
        )

    def rename(self, cost: Cost) -> Cost:
        """Return ``cost`` in ``b``, ``q`` and ``t``."""
        return Cost(*(sympy.expand(part.xreplace(self._meaning)) for part in cost.parts()))

    def _mean_buffers(self, attention: list[fx.Node], effects: Effects) -> bool:
        """Give a meaning to the lengths of buffers that attention writes into; tell whether there are any."""
        regions = set(attention)
        buffers = {write.root for write in effects.writes if write.node in regions and shape_of(write.root)}
        for buffer in buffers:
            self._mean({symbol: T for size in shape_of(buffer) for symbol in size.free_symbols})
        return bool(buffers)

    def _mean_growing(self, attention: list[fx.Node], effects: Effects) -> bool:
        """Give a meaning to the lengths of caches that come in; tell whether there are any.

        The longest is all tokens so far: a window is shorter or as long.
        """
        inputs = {effects.roots[source] for node in attention for source in node.all_input_nodes}
        given = [node for node in inputs if node.op == "placeholder" and not held_by_module(node) and _is_cache(node)]
        lengths = {symbol: length for symbol, length in _lengths(given).items() if symbol not in self._meaning}
        cached = T - self.fixed.get(Q.name, Q)
        self._mean({symbol: cached for symbol, length in lengths.items() if length == max(lengths.values())})
        return bool(given)

    def _mean(self, meaning: Mapping[sympy.Basic, sympy.Expr]) -> None:
        self._meaning = {**meaning, **self._meaning}


def _is_cache(node: fx.Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and tensor.is_floating_point() and tensor.dim() > 2


def _lengths(nodes: Iterable[fx.Node]) -> dict[sympy.Basic, int]:
    """Map the symbols that are sizes of ``nodes`` to their values at capture."""
    sizes = [size for node in nodes for size in getattr(fake_value(node), "shape", (fake_value(node),))]
    symbolic = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    return {size.expr: size.hint for size in symbolic if size.expr.is_Symbol and size.hint is not None}
