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
from adaskip_passes.ir.values import make_fake_tensor


def raise_hint(graph: fx.Graph, size: torch.SymInt, least: int) -> None:
    """Let the values of ``graph`` be those of a call in which ``size`` is ``least`` or a little more; it was captured with less.

    Sizes stay the expressions that they are, in an environment and a fake mode of their own: what is found out of many rows
    must not be believed of the other graphs of this capture.

    Raises:
        PassError: ``size`` is no symbol, or never so large, or what the capture has assumed does not hold then; or the graph has
            sizes that are known only at run time, or tensors of other kinds than PyTorch's own.
    """
    try:
        # A prime, so that it is never taken for a size of the model.
        raised = _Raised.of_size(size, int(sympy.nextprime(least - 1)))
        nodes = [node for node in graph.nodes if "example_value" in node.meta]
        with torch.inference_mode(False):  # what is made here is read in every later call
            values = [raised.of(node.meta["example_value"]) for node in nodes]
    except PassError:
        raise
    except Exception as error:  # torch's innards, of which 2.13 was tried
        raise PassError(f"rows cannot be told to be more: {type(error).__name__}: {error}") from error
    for node, value in zip(nodes, values, strict=True):
        node.meta["example_value"] = value


def _hints(env: ShapeEnv, symbol: sympy.Symbol, number: int) -> dict[sympy.Symbol, sympy.Expr]:
    """Return what each symbol of ``env`` is where ``symbol`` is ``number``."""
    hints = {**env.backed_var_to_val, symbol: sympy.Integer(number)}
    hints |= {one: env.replace(one).xreplace(hints) for one in env.replacements}
    for guard in env.guards:
        if env.replace(guard.expr).xreplace(hints) is sympy.false:
            raise PassError(f"the graph is one for fewer rows: its capture has assumed {guard.expr}")
    return hints


def _copied(env: ShapeEnv, hints: Mapping[sympy.Symbol, sympy.Expr]) -> ShapeEnv:
    """Return an environment of the same symbols, and what is known of them, with other hints."""
    again = ShapeEnv()
    again.backed_var_to_val.update(hints)
    again.var_to_range.update(env.var_to_range)
    again.var_to_sources.update(env.var_to_sources)
    again.symbol_guard_counter.update(env.symbol_guard_counter)
    again.unique_ids.update(env.unique_ids)  # a new symbol has the name of none of these
    again.var_to_range_sloc.update({symbol: copy.copy(where) for symbol, where in list(env.var_to_range_sloc.items())})
    for symbol, known in list(env.replacements.items()):
        again._set_replacement(symbol, known, "copied")  # values look for news of these by a count that it keeps
    return again


@dataclass(frozen=True)
class _Raised:
    """Makes values again under ``mode``, with the ``hints`` of its environment."""

    mode: FakeTensorMode
    hints: Mapping[sympy.Symbol, sympy.Expr]

    @classmethod
    def of_size(cls, size: torch.SymInt, number: int) -> _Raised:
        """Return what makes values again of a call in which ``size`` is ``number``."""
        symbol, env = size.node.expr, size.node.shape_env
        known = env.var_to_range.get(symbol)
        if not symbol.is_Symbol or (known is not None and known.upper < number):
            raise PassError(f"the graph was captured with {size.node.hint} rows, and is for none of {number}")
        hints = _hints(env, symbol, number)
        return cls(FakeTensorMode(shape_env=_copied(env, hints), allow_non_fake_inputs=True), hints)

    def of(self, value: Any) -> Any:
        """Return ``value`` with the hints."""
        env: Any = self.mode.shape_env
        if isinstance(value, (tuple, list)):
            return type(value)([self.of(item) for item in value])
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.SymInt):
            return env.create_symintnode(value.node._expr, hint=int(self._hint(value)))
        if isinstance(value, torch.SymFloat):
            return env.create_symfloatnode(value.node._expr, hint=float(self._hint(value)))
        return env.create_symboolnode(value.node._expr) if isinstance(value, torch.SymBool) else value

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
        parameter = isinstance(value, torch.nn.Parameter)
        offset = self.of(value.storage_offset())
        return make_fake_tensor(self.mode, shape, stride, value.dtype, value.device, parameter=parameter, offset=offset)
