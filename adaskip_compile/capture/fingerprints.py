"""What tells functions, classes, modules and files from others in any process, where their addresses mean nothing."""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from adaskip_passes.errors import CaptureError

_CONSTANTS = (bool, type(None), torch.dtype, torch.layout, torch.device)
_PLAIN = (int, float, complex, str, bytes, type(...), range, slice)


def describe(value: Any) -> tuple[str, ...]:
    """Return what tells ``value`` from others of its kind, the kind first; :class:`CaptureError` where that is not known."""
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if isinstance(value, type):
        return ("class", value.__module__, value.__qualname__)
    if isinstance(value, types.CodeType):
        return ("code", value.co_name, code_digest(value))
    if isinstance(value, types.FunctionType):
        return ("function", value.__module__, value.__qualname__, code_digest(value.__code__))
    if isinstance(value, (types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return ("operation", str(getattr(value, "__module__", "")), str(value.__name__))
    if isinstance(value, _CONSTANTS):
        return ("constant", repr(value))
    raise CaptureError(f"nothing that lasts tells one {type(value).__name__} from another")


class CallableDescriber:
    """Describes functions, methods and hooks by all that makes them compute what they do: code, defaults, closure.

    Called with a value, it returns what :func:`describe` would, with the parts of it; a value that it meets again goes
    by its number. ``place_of`` tells where in the model a module lies, None for one that is none of its modules.
    """

    def __init__(self, place_of: Callable[[Any], str | None]) -> None:
        self._place_of = place_of
        self._met: dict[int, tuple[int, Any]] = {}  # with the value, so that no other one gets its identity

    def __call__(self, value: Any) -> tuple[Any, ...]:
        """Describe ``value``; :class:`CaptureError` where a part of it is not known."""
        if isinstance(value, (*_CONSTANTS, *_PLAIN)):
            return (type(value).__name__, repr(value))
        if id(value) in self._met:
            return ("again", self._met[id(value)][0])
        self._met[id(value)] = (len(self._met), value)
        place = self._place_of(value)
        if place is not None:
            return ("module of the model", place)
        parts = _parts(value)
        if parts is None:
            return describe(value)
        kind, names, inner = parts
        return (kind, *names, *map(self, inner))


def _parts(value: Any) -> tuple[str, tuple[Any, ...], list[Any]] | None:
    """Return of a value the kind, what tells it by itself, and what else it is made of; None where it is no compound."""
    if isinstance(value, types.FunctionType):
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        inner = [*defaults, *(cell_content(cell) for cell in value.__closure__ or ())]
        return "function", (value.__module__, value.__qualname__, code_digest(value.__code__)), inner
    if isinstance(value, types.MethodType):
        return "method", (), [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return "partial", (), [value.func, value.args, value.keywords]
    if isinstance(value, functools._lru_cache_wrapper):
        return "cached", (), [value.__wrapped__]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, (), list(value)
    if isinstance(value, dict):
        return "dict", (), [part for item in value.items() for part in item]
    if isinstance(value, (set, frozenset)):
        return "set", (), sorted(value, key=repr)
    if isinstance(value, (enum.Enum, re.Pattern)):
        return type(value).__qualname__, (str(value), repr(value)), []
    kind = type(value)
    if kind is object:
        return "object", (), []
    own = getattr(value, "__dict__", None)
    if type(own) is not dict or isinstance(value, (type, types.ModuleType, torch.Tensor, torch.nn.Module)):
        return None
    # Any object: its class says what it does, and its attributes what with.
    members = [function for base in kind.__mro__[:-1] for one in vars(base).values() for function in functions_of(one)]
    return "object", (kind.__module__, kind.__qualname__), [*members, own]


def functions_of(member: Any) -> Iterator[Any]:
    """Yield the functions that a member of a class consists of; none for one that is no function."""
    if isinstance(member, (staticmethod, classmethod)):
        yield member.__func__
    elif isinstance(member, property):
        yield from (part for part in (member.fget, member.fset, member.fdel) if part is not None)
    elif isinstance(member, functools.cached_property):
        yield member.func
    elif callable(member) and not isinstance(member, type):
        yield member


def cell_content(cell: types.CellType) -> Any:
    """Return what a cell of a closure holds; an ellipsis for one that is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return ...


def code_digest(code: types.CodeType) -> str:
    """Return a digest of what ``code`` does: its instructions, names and constants."""
    digest = hashlib.sha256(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            text = code_digest(constant)
        else:
            # The order of a set differs from one process to the next.
            text = repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
        digest.update(text.encode())
    return digest.hexdigest()


def file_digest(file: str) -> str:
    """Return the SHA-256 of a file; :class:`CaptureError` where it cannot be read."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise CaptureError(f"{file} cannot be read") from error


def decorators_above(function: types.FunctionType) -> int:
    """Return under how many decorators ``function`` lies where its name says; 0 for none, or where it is not there."""
    try:
        found: Any = unwrapped(function.__module__, function.__qualname__, 0)
    except (ImportError, AttributeError):
        return 0
    depth = 0
    while found is not function and hasattr(found, "__wrapped__"):
        found, depth = found.__wrapped__, depth + 1
    return depth if found is function else 0


def unwrapped(module: str, name: str, depth: int) -> Any:
    """Return what ``name`` is in ``module``, without ``depth`` of its decorators."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    for _ in range(depth):
        found = found.__wrapped__
    return found
