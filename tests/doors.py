"""The ways to compile a model with this package, by the names that tests are parametrised with."""

from __future__ import annotations

from typing import Any

import torch

import adaskip_compile
from adaskip_compile import SkipPlan


def compiled_by(door: str, model: Any, plan: SkipPlan, **options: Any) -> Any:
    """Return what to call of ``model``, compiled by ``door``: ``compile``, ``torch.compile`` or ``model.compile``."""
    if door == "compile":
        return adaskip_compile.compile(model, plan, **options)
    if door == "torch.compile":
        settings: Any = {"plan": plan, **options}
        return torch.compile(model, backend="adaskip", options=settings)
    model.compile(backend="adaskip", options={"plan": plan, **options})
    return model
