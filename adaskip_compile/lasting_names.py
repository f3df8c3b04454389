"""What tells functions, classes, modules and files from others in any process, where their addresses mean nothing."""

from __future__ import annotations

import hashlib
import importlib
import types
from pathlib import Path
from typing import Any

import torch

from adaskip_passes.errors import CaptureError

_CONSTANTS = (bool, type(None), torch.dtype, torch.layout, torch.device)


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
    raise CaptureError(f"a guard compares the identity of a {type(value).__name__}")


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
