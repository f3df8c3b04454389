"""What a symbolic size was when its graph was captured (its hint), where another one is to be told by.

Operations on fake values ask hints for what a size alone does not say, such as whether rows are left between the first and the
last ones. A graph that was captured with few rows answers for few rows, and may be meant for many.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaskip_passes.errors import PassError


def raise_hint(graph: fx.Graph, size: torch.SymInt, least: int) -> None:
    """Let the values of ``graph`` be those of a call in which ``size`` is ``least``; it was captured with less.

    Sizes stay the expressions that they are, in an environment and a fake mode of their own: what is found out of many rows
    must not be believed of the other graphs of this capture.

    Raises:
        PassError: ``size`` is no symbol, or never so large; or the graph has sizes that are known only at run time, or tensors
            of other kinds than PyTorch's own.
    """
    symbol, env = size.node.expr, size.node.shape_env
    known = env.var_to_range.get(symbol)
    if not symbol.is_Symbol or (known is not None and known.upper < least):
        raise PassError(f"the graph was captured with {size.node.hint} rows, and cannot be told to have {least}")
    hints = {**env.backed_var_to_val, symbol: sympy.Integer(least)}
    raised = _Raised(FakeTensorMode(shape_env=_copied(env, hints), allow_non_fake_inputs=True), hints)
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["example_value"] = raised.of(node.meta["example_value"])


def _copied(env: ShapeEnv, hints: Mapping[sympy.Symbol, sympy.Expr]) -> ShapeEnv:
    """Return an environment of the same symbols, and what is known of them, with other hints."""
    again = ShapeEnv()
    try:
        again.backed_var_to_val.update(hints)
        again.var_to_range.update(env.var_to_range)
        again.var_to_sources.update(env.var_to_sources)
        again.symbol_guard_counter.update(env.symbol_guard_counter)
        again.var_to_range_sloc.update({symbol: copy.copy(where) for symbol, where in env.var_to_range_sloc.items()})
    except AttributeError as error:  # internals: 2.13 was tried
        raise PassError(f"torch {torch.__version__} keeps what it knows of sizes in another place: {error}") from error
    return again


@dataclass(frozen=True)
class _Raised:
    """Makes values again under ``mode``, with the ``hints`` of its environment."""

    mode: FakeTensorMode
    hints: Mapping[sympy.Symbol, sympy.Expr]

    def of(self, value: Any) -> Any:
        """Return ``value`` with the hints."""
        env: Any = self.mode.shape_env
        if isinstance(value, (tuple, list)):
            return type(value)([self.of(item) for item in value])
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.SymInt):
            return env.create_symintnode(value.node.expr, hint=int(self._hint(value)))
        if isinstance(value, torch.SymFloat):
            return env.create_symfloatnode(value.node.expr, hint=float(self._hint(value)))
        return env.create_symboolnode(value.node.expr) if isinstance(value, torch.SymBool) else value

    def _hint(self, value: Any) -> sympy.Expr:
        hint = value.node.expr.xreplace(dict(self.hints))
        if hint.free_symbols:
            raise PassError(
                f"the size {value.node.expr} is known only at run time, so that rows cannot be told to be more"
            )
        return hint

    def _tensor(self, value: torch.Tensor) -> FakeTensor:
        if type(value) is not FakeTensor or value.layout is not torch.strided:
            raise PassError(f"values of {type(value).__name__} cannot be told to have more rows")
        shape, stride = ([self.of(size) for size in sizes] for sizes in (value.shape, value.stride()))
        plain = torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
        made = FakeTensor(self.mode, plain, value.device)
        if isinstance(value, torch.nn.Parameter):
            made._is_param = True  # type: ignore[attr-defined]  # what makes it an instance of nn.Parameter
        return made
