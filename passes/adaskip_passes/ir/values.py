"""The values in a graph as JSON-able data: arguments of nodes, fake tensors, symbolic sizes, call targets.

What JSON holds as it is, stays so; anything else is a dict of one key that says what it is, such as
``{"dtype": "float32"}`` or ``{"node": "add_3"}``. A value of an unknown type is kept by its name alone,
``{"opaque": "SDPBackend.MATH"}``: enough to see it, and passes look at no such value.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaskip_passes.errors import DamagedFileError
from adaskip_passes.ir.expressions import from_tree, to_tree

__all__ = ["ValueReader", "make_fake_tensor", "write_value"]


def write_value(value: Any) -> Any:
    """Return ``value`` as JSON-able data."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple, dict, slice)):
        return _write_container(value)
    if isinstance(value, torch.Tensor):
        return {"tensor": _write_tensor(value)}
    for kind, write in _WRITERS.items():
        if isinstance(value, kind):
            return write(value)
    return {"function": _function_name(value)} if callable(value) else {"opaque": str(value)}


def _write_container(value: Any) -> Any:
    if isinstance(value, list):
        return [write_value(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [write_value(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [write_value(part) for part in (value.start, value.stop, value.step)]}
    return {"dict": [[write_value(key), write_value(item)] for key, item in value.items()]}


def _write_tensor(value: torch.Tensor) -> dict[str, Any]:
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": [_write_size(size) for size in value.shape],
        "stride": [_write_size(stride) for stride in value.stride()],
        "device": str(value.device),
        "parameter": isinstance(value, torch.nn.Parameter),
        **({} if _is_zero(value.storage_offset()) else {"offset": _write_size(value.storage_offset())}),
    }


def _is_zero(size: Any) -> bool:
    """Whether ``size`` is known to be 0; asking ``size == 0`` would assume it."""
    return isinstance(size, int) and size == 0


def _write_size(size: Any) -> Any:
    return size if isinstance(size, int) else to_tree(size.node.expr)


_WRITERS: dict[Any, Callable[[Any], Any]] = {
    fx.Node: lambda node: {"node": node.name},
    # What a number was made with tells more than what has been found of it since, which the symbols tell.
    torch.SymInt: lambda value: {"int": to_tree(value.node._expr)},
    torch.SymFloat: lambda value: {"symfloat": to_tree(value.node._expr)},
    torch.SymBool: lambda value: {"bool": to_tree(value.node.expr)},
    torch.dtype: lambda value: {"dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"device": str(value)},
    torch.layout: lambda value: {"dtype": str(value).removeprefix("torch.")},
    torch.memory_format: lambda value: {"dtype": str(value).removeprefix("torch.")},
    type(Ellipsis): lambda _: {"ellipsis": True},
}


def _function_name(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return f"torch.ops:{function.namespace}.{function._opname}.{function._overloadname}"
    if isinstance(function, torch._ops.OpOverloadPacket):
        return f"torch.ops:{function._qualified_op_name.replace('::', '.')}"
    name = getattr(function, "__name__", None) or type(function).__name__
    return f"{getattr(function, '__module__', None) or 'torch'}:{name}"


class ValueReader:
    """Reads what :func:`write_value` wrote; ``symbols`` are the symbols of the graph by name, their environment under ``""``.

    An operation that is not installed here has a stub, or is refused without ``stubs``.
    """

    def __init__(self, symbols: Mapping[str, Any], *, stubs: bool = True) -> None:
        self._stubs = stubs
        self._symbols, self._env = symbols, symbols[""]
        self._mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._nodes: Mapping[str, fx.Node] = {}
        self._known: dict[str, Any] = {}

    def with_nodes(self, nodes: Mapping[str, fx.Node]) -> ValueReader:
        """Return a reader of the same symbols and fake mode that knows ``nodes`` by name."""
        reader = copy.copy(self)
        reader._nodes = nodes
        return reader

    def read(self, data: Any) -> Any:
        """Return the value; :class:`DamagedFileError` where ``data`` is of no known kind."""
        if isinstance(data, list):
            return [self.read(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((kind, content),) = data.items()
        try:
            return getattr(self, f"_read_{kind}")(content)
        except AttributeError as error:
            raise DamagedFileError(f"a saved graph holds {data!r}: {error}") from error

    def read_known(self, data: Any) -> Any:
        """Return what :meth:`read` does, one object for equal ``data``: a graph has thousands of values, and few kinds of them."""
        key = repr(data)
        if key not in self._known:
            self._known[key] = self.read(data)
        return self._known[key]

    def _read_float(self, content: str) -> float:
        return float(content)

    def _read_tuple(self, content: list[Any]) -> tuple[Any, ...]:
        return tuple(map(self.read, content))

    def _read_slice(self, content: list[Any]) -> slice:
        return slice(*map(self.read, content))

    def _read_dict(self, content: list[Any]) -> dict[Any, Any]:
        return {self.read(key): self.read(item) for key, item in content}

    def _read_node(self, content: str) -> fx.Node:
        if content not in self._nodes:
            raise DamagedFileError(f"a saved graph uses the node {content!r} before it makes it")
        return self._nodes[content]

    def _read_dtype(self, content: str) -> Any:
        return getattr(torch, content)

    def _read_device(self, content: str) -> torch.device:
        return torch.device(content)

    def _read_ellipsis(self, _: bool) -> Any:
        return ...

    def _read_opaque(self, content: str) -> str:
        return content

    def _read_int(self, content: Any) -> Any:
        if isinstance(content, int):
            return content
        expression = from_tree(content, self._symbols)
        if not expression.free_symbols:
            return int(expression)
        return self._env.create_symintnode(expression, hint=self._hint(expression, int))

    def _read_symfloat(self, content: Any) -> Any:
        expression = from_tree(content, self._symbols)
        return self._env.create_symfloatnode(expression, hint=self._hint(expression, float))

    def _read_bool(self, content: Any) -> Any:
        expression = from_tree(content, self._symbols)
        return bool(expression) if isinstance(content, bool) else self._env.create_symboolnode(expression)

    def _hint(self, expression: Any, kind: type) -> Any:
        value = expression.xreplace(dict(self._env.backed_var_to_val))
        return None if value.free_symbols else kind(value)

    def _read_tensor(self, content: dict[str, Any]) -> torch.Tensor:
        shape, stride = ([self._read_int(size) for size in content[name]] for name in ("shape", "stride"))
        dtype, device = getattr(torch, content["dtype"]), torch.device(content["device"])
        offset = self._read_int(content.get("offset", 0))
        return make_fake_tensor(self._mode, shape, stride, dtype, device, parameter=content["parameter"], offset=offset)

    def _read_function(self, content: str) -> Any:
        module, _, path = content.partition(":")
        try:
            owner = torch.ops if module == "torch.ops" else importlib.import_module(module)
            for name in path.split("."):
                owner = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            if not self._stubs:
                raise DamagedFileError(f"a saved graph calls {content}, which is not installed here") from error
            return _stub(module, path.rpartition(".")[2])
        return owner


def make_fake_tensor(
    mode: FakeTensorMode,
    shape: Sequence[Any],
    stride: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    parameter: bool,
    offset: Any = 0,
) -> FakeTensor:
    """Return a fake tensor of those sizes under ``mode``, one that counts as a parameter where asked to."""
    # Made as what it stands for, and not by an operation under the fake mode: a graph has thousands.
    meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    made = FakeTensor(mode, meta if _is_zero(offset) else meta.as_strided(shape, stride, offset), device)
    if parameter:
        made._is_param = True  # type: ignore[attr-defined]  # what makes it an instance of nn.Parameter
    return made


def _stub(module: str, name: str) -> Callable[..., Any]:
    """Return a function that has the name of one that is not installed here."""

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{module}.{name} is not installed here; a saved graph is rewritten, not run")

    missing.__name__ = missing.__qualname__ = name
    missing.__module__ = module
    return missing
