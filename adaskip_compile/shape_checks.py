"""Check at run time what the capture could not prove: that a borrowed cache output has the right shape.

The cache output of a skipped sublayer is a view of a kept one's. Both had the same shape when the
graph was captured, but Dynamo may have given each layer's cache a symbol of its own; layers with and
without a sliding window part ways once the window is full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.errors import LegalityError
from adaskip_passes.graph import fake_tensor, fake_value
from adaskip_passes.state import output_values


class ShapeCheck:
    """Compares the outputs of ``rewritten`` with the shapes that ``captured`` would give. Empty where all are proven."""

    def __init__(self, captured: fx.GraphModule, rewritten: fx.GraphModule) -> None:
        pairs = zip(output_values(captured), output_values(rewritten), strict=False)
        self._wanted = [
            (position, [_expression(size) for size in _shape(was)])
            for position, (was, now) in enumerate(pairs)
            if _shape(was) is not None and str(_shape(was)) != str(_shape(now))
        ]
        if self._wanted:
            self._symbols = _symbol_sources(captured)
            sizes = [size for _, shape in self._wanted for size in shape]
            self._evaluate: Callable[..., list[Any]] = sympy.lambdify(list(self._symbols), sizes, "math")

    def check(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Raise :class:`LegalityError` where an output has not the shape that the unskipped graph would give."""
        if not self._wanted:
            return
        sizes = iter(self._evaluate(*(read(inputs) for read in self._symbols.values())))
        for position, shape in self._wanted:
            expected = tuple(next(sizes) for _ in shape)
            if tuple(outputs[position].shape) != expected:
                raise LegalityError(
                    f"a skipped sublayer's cache entry should have the shape {expected}, but the kept one that stands for "
                    f"it has {tuple(outputs[position].shape)}; keep one sublayer of each cache length in the plan"
                )


def _shape(node: fx.Node | None) -> Any:
    value = fake_tensor(node)
    return None if value is None else tuple(value.shape)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _symbol_sources(gm: fx.GraphModule) -> dict[sympy.Symbol, Callable[[Sequence[Any]], int]]:
    """Map each symbol to a function that reads it off the graph's inputs."""
    found: dict[sympy.Symbol, Callable[[Sequence[Any]], int]] = {}
    for place, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder"):
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found.setdefault(value.node.expr, lambda inputs, place=place: int(inputs[place]))
        for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, lambda inputs, place=place, dim=dim: inputs[place].shape[dim])
    return found
