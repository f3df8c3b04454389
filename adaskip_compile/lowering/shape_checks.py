"""Check at run time what the capture could not prove: the shapes of borrowed cache outputs, and what compiled code assumes.

The cache output of a skipped sublayer is a view of a kept one's. Both had the same shape when the
graph was captured, but Dynamo may have given each layer's cache a symbol of its own; layers with and
without a sliding window part ways once the window is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from adaskip_passes.errors import LegalityError
from adaskip_passes.ir.graph import fake_tensor, fake_value, output_values, size_expression


class ShapeCheck:
    """Compares the outputs of ``rewritten`` with the shapes that ``captured`` would give. Empty where all are proven."""

    def __init__(self, captured: fx.GraphModule, rewritten: fx.GraphModule) -> None:
        pairs = zip(output_values(captured), output_values(rewritten), strict=False)
        self._wanted = [
            (position, [size_expression(size) for size in _shape(was)])
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


class AssumptionCheck:
    """Calls ``compiled`` where the sizes of a call are what the compiler assumed, and ``plain``, the graph op by op, where not.

    Code is compiled after the capture has ended, so what the compiler then assumes, ``assumed``, is in none of
    Dynamo's guards. ``gm`` is the graph that both compute.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        assumed: Sequence[sympy.Basic],
        compiled: Callable[..., Any],
        plain: Callable[..., Any],
        note: Callable[[str], None],
    ) -> None:
        self._compiled, self._plain, self._note = compiled, plain, note
        self._symbols, self._assumed = _symbol_sources(gm), tuple(assumed)
        # What speaks of a size that no input tells cannot be checked, and so does not hold.
        told = [one if one.free_symbols <= self._symbols.keys() else sympy.false for one in assumed]
        self._evaluate = sympy.lambdify(list(self._symbols), told, "math", printer=PythonPrinter())

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph on ``inputs``."""
        held = self._evaluate(*(read(inputs) for read in self._symbols.values()))
        if all(held):
            return self._compiled(*inputs)
        broken = next(one for one, holds in zip(self._assumed, held, strict=True) if not holds)
        self._note(f"code was compiled for sizes with {broken}; calls where this does not hold run op by op")
        return self._plain(*inputs)


def _shape(node: fx.Node | None) -> Any:
    value = fake_tensor(node)
    return None if value is None else tuple(value.shape)


def _symbol_sources(gm: fx.GraphModule) -> dict[sympy.Symbol, Callable[[Sequence[Any]], int]]:
    """Map each symbol to a function that reads it off the graph's inputs."""
    found: dict[sympy.Symbol, Callable[[Sequence[Any]], int]] = {}
    later: dict[sympy.Symbol, Callable[[Sequence[Any]], int]] = {}
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        for size, read in _readers(fake_value(node), place):
            found.setdefault(size.node._expr, read)
            later.setdefault(size.node.expr, read)
    # What has a symbol of its own is where to read it, also where the compiler has taken two to be equal since.
    return {symbol: read for symbol, read in {**later, **found}.items() if symbol.is_Symbol}


def _readers(value: Any, place: int) -> Iterator[tuple[Any, Callable[[Sequence[Any]], int]]]:
    """Yield the symbolic sizes of the input ``value``, each with the function that reads it off all inputs."""
    if isinstance(value, torch.SymInt):
        yield value, lambda inputs: int(inputs[place])
    for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
        if isinstance(size, torch.SymInt):
            yield size, lambda inputs, dim=dim: inputs[place].shape[dim]
