"""What a model calls its cache: ``cache`` from transformers 5.24 on, and ``past_key_values`` before, a name that now warns."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_NAMES = ("cache", "past_key_values", "cache_params")


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return ``cache`` as keyword arguments for a call of ``model``, under the name that its forward has for it.

    A wrapper whose forward takes anything hands it on: the name is then that of the first module inside that has one.
    """
    for module in model.modules():
        known = inspect.signature(module.forward).parameters
        for name in _NAMES:
            if name in known:
                return {name: cache}
    return {_NAMES[0]: cache}


def cache_of(result: Any) -> Any:
    """Return the cache that ``result``, what a model of transformers returned, holds; None where it holds none."""
    return next((result[name] for name in _NAMES if name in result), None)
