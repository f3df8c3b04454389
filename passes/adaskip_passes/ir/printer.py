"""A stable text of an FX graph, for reading, for golden tests, and for telling whether a pass changed it.

One line a node::

    %hidden_states_3: f32[1, s0, 64] = operator.add(%inputs_embeds, %attn_output_4)  # model.layers.0

The text holds names, types, targets, arguments and module paths, and nothing that changes from one
capture of the same model to the next: symbols are numbered by first appearance (``s`` sizes, ``u``
sizes known only at run time, ``f`` floats), inputs are named by where they come from, and there are
no addresses, ids or times. A device is written after a shape only where it is not the graph's first.

>>> from torch import fx, nn
>>> print(print_graph(fx.symbolic_trace(nn.ReLU())))
%input_1 = placeholder
%relu = nn.functional.relu(%input_1, inplace=False)
output(%relu)
"""

from __future__ import annotations

import difflib
import enum
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.ir.graph import fake_tensor, fake_value
from adaskip_passes.ir.module_paths import module_path, source_name

__all__ = ["diff_graphs", "print_graph"]

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_MODULE_NAMES = {"_operator": "operator", "torch._C._nn": "nn", "torch.nn.functional": "nn.functional"}
# A placeholder that only carries a symbol is named after it, and symbols have no stable names.
_SYMBOL_NAME = re.compile(r"^[a-z]{1,2}\d+(_\d+)?$")


def print_graph(gm: fx.GraphModule) -> str:
    """Return the textual IR of ``gm``: one line a node, subgraphs indented below, no final newline.

    Two captures of one model print the same text, and printing never changes the graph.
    """
    printer = _Printer(_first_device(gm.graph))
    return "\n".join(printer.lines(gm))


def diff_graphs(before: str, after: str, *, context: int = 3) -> str:
    """Return the unified diff of two graph texts with ``context`` lines around a change; empty where equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", n=context, lineterm="")
    return "\n".join(lines)


class _Symbols:
    """Numbers the symbols of a graph by first appearance."""

    def __init__(self) -> None:
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        self._written: dict[sympy.Basic, str] = {}

    def write(self, expression: sympy.Basic) -> str:
        if expression not in self._written:
            self._written[expression] = self._text(expression)
        return self._written[expression]

    def _text(self, expression: sympy.Basic) -> str:
        if expression.is_number:
            return str(expression) if expression.is_Integer else repr(float(expression))  # type: ignore[arg-type]
        for symbol in sorted(expression.atoms(sympy.Symbol), key=str):
            if symbol not in self._names:
                self._names[symbol] = self._rename(symbol)
        return str(expression.xreplace(self._names))

    def _rename(self, symbol: sympy.Symbol) -> sympy.Symbol:
        letter = "f"
        if symbol.assumptions0.get("integer"):
            letter = "u" if symbol.name.startswith("u") else "s"
        number = sum(str(name).startswith(letter) for name in self._names.values())
        # The same assumptions, or sympy would simplify the copy otherwise than the original.
        return sympy.Symbol(f"{letter}{number}", **symbol.assumptions0)


class _Printer:
    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._symbols = _Symbols()
        self._names: dict[fx.Node, str] = {}

    def lines(self, gm: fx.GraphModule) -> Iterator[str]:
        self._name_nodes(gm.graph)
        for node in gm.graph.nodes:
            yield self._line(node)
            if node.op in ("get_attr", "call_module"):
                yield from self._subgraph(_attribute(gm, str(node.target)))
            elif node.op == "call_function":
                yield from self._subgraph(getattr(node.target, "gm", None))  # of a region

    def _subgraph(self, inner: Any) -> Iterator[str]:
        if isinstance(inner, fx.GraphModule):
            yield from (f"    {line}" for line in self.lines(inner))

    def _name_nodes(self, graph: fx.Graph) -> None:
        taken: set[str] = set()
        for node in graph.nodes:
            name = wanted = _wanted_name(node)
            number = 0
            while name in taken:
                number += 1
                name = f"{wanted}'{number}"
            taken.add(name)
            self._names[node] = name

    def _line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"output({self._arguments(_as_tuple(node.args[0]), {})})"
        text = f"%{self._names[node]}{self._type(node)} = {self._call(node)}"
        path = "" if node.op == "placeholder" else module_path(node)
        return f"{text}  # {path}" if path else text

    def _call(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return "placeholder" if not node.args else f"placeholder(default={self._value(node.args[0])})"
        if node.op == "get_attr":
            return f"get_attr {node.target}"
        prefix = {"call_method": ".", "call_module": "module "}.get(node.op, "")
        return f"{prefix}{_target_name(node.target)}({self._arguments(node.args, node.kwargs)})"

    def _type(self, node: fx.Node) -> str:
        value = fake_value(node)
        return "" if value is None else f": {self._type_of(value)}"

    def _type_of(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self._value(size) for size in value.shape)
            device = "" if value.device == self._device else f"@{value.device}"
            return f"{_dtype_name(value.dtype)}[{sizes}]{device}"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self._type_of(item) for item in value)})"
        for kind, types in (
            ("bool", (bool, torch.SymBool)),
            ("int", (int, torch.SymInt)),
            ("float", (float, torch.SymFloat)),
        ):
            if isinstance(value, types):
                return f"{kind}({self._value(value)})"
        return type(value).__name__

    def _arguments(self, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
        positional = [self._value(value) for value in args]
        return ", ".join(positional + [f"{name}={self._value(value)}" for name, value in kwargs.items()])

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{self._names[value]}"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbols.write(sympy.sympify(value.node.expr))
        if isinstance(value, (list, tuple, dict, set, frozenset, slice)):
            return self._container(value)
        if isinstance(value, functools.partial):
            return f"partial({self._arguments((value.func, *value.args), value.keywords)})"
        return _constant(value)

    def _container(self, value: Any) -> str:
        if isinstance(value, slice):
            start, stop, step = (
                "" if part is None else self._value(part) for part in (value.start, value.stop, value.step)
            )
            return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._value(key)}: {self._value(item)}" for key, item in value.items()) + "}"
        items = [self._value(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return "{" + ", ".join(sorted(items)) + "}"
        if isinstance(value, list):
            return f"[{', '.join(items)}]"
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def _constant(value: Any) -> str:
    if value is Ellipsis:
        return "..."
    if isinstance(value, torch.dtype):
        return _dtype_name(value)
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, torch.Tensor):
        return f"constant {_dtype_name(value.dtype)}{list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, range)):
        return repr(value)
    return _target_name(value) if callable(value) else f"<{type(value).__name__}>"


def _target_name(target: Any) -> str:
    """Name a call target without its address: ``torch.cat``, ``operator.add``, ``aten.add.Tensor``."""
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", None) or type(target).__name__
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        # Its module depends on who has registered it first.
        return f"torch.ops.{target._qualified_op_name.replace('::', '.')}"
    module = getattr(target, "__module__", None) or ("torch" if getattr(torch, name, None) is target else "")
    module = _MODULE_NAMES.get(module, module)
    return f"{module}.{name}" if module else name


def _dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _wanted_name(node: fx.Node) -> str:
    if node.op != "placeholder":
        return node.name
    carries_symbol = isinstance(fake_value(node), (torch.SymInt, torch.SymFloat)) and _SYMBOL_NAME.match(node.name)
    return source_name(node) or ("symbol" if carries_symbol else node.name)


def _first_device(graph: fx.Graph) -> torch.device | None:
    tensors = (fake_tensor(node) for node in graph.nodes)
    return next((tensor.device for tensor in tensors if tensor is not None), None)


def _attribute(module: Any, path: str) -> Any:
    return functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), module)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
