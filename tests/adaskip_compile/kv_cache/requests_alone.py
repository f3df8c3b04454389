"""Requests that are interrupted: begun, left alone while others run, and gone on with; and the same ones run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_compile.planning.skip_plan import RampStep
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from tests.models import tokens
from tests.reference import omit_sublayers, run_request

ONE = {"model.layers.0.self_attn": 0.95, "model.layers.2.self_attn": 1.03}
OTHER = {"model.layers.1.self_attn": 1.02, "model.layers.2.mlp": 0.97}
# The holes of ONE, and yet another plan.
SCALED = {"model.layers.0.self_attn": 0.7, "model.layers.2.self_attn": 1.3}
FFN = {"model.layers.1.mlp": 0.8}
Scales = Mapping[str, float]
IDS = tokens(2, 4, seed=7)


def use(model: Any, plan: Scales | SkipPlan, **options: Any) -> None:
    """Have requests of ``model`` that start from now on follow ``plan``."""
    chosen = plan if isinstance(plan, SkipPlan) else SkipPlan.from_scales(dict(plan))
    adaskip_compile.compile(model, chosen, inner="eager", **options)


def begin(model: Any, plan: Scales | SkipPlan, cache: Any, *, seed: int = 0, rows: int = 2, steps: int = 3) -> Any:
    """Start a request of nine tokens and ``steps`` more under ``plan``; return its cache."""
    use(model, plan)
    run_request(model, tokens(rows, 9, seed=seed), tokens(rows, steps, seed=seed + 50), cache=cache)
    return cache


def go_on(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits ``(steps, batch, vocabulary)`` of more calls on ``cache``, one for each column of ``ids``."""
    logits = []
    with torch.no_grad():
        for one in ids.split(1, dim=1):
            positions = torch.full_like(one, int(cache.get_seq_length()))
            logits.append(
                model(one, position_ids=positions, use_cache=True, **cache_argument(model, cache)).logits[:, -1]
            )
    return torch.stack(logits)


def alone(
    model: Any, scales: Scales, cache: Any, ids: torch.Tensor, *, seed: int = 0, act: Callable[[Any], object] = id
) -> torch.Tensor:
    """Return what :func:`go_on` must give: the same request on the eager model that omits the sublayers of ``scales``."""
    model._compiled_call_impl = None
    with omit_sublayers(model, scales):
        run_request(model, tokens(2, 9, seed=seed), tokens(2, 3, seed=seed + 50), cache=cache)
        act(cache)
        return go_on(model, cache, ids)


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@contextmanager
def scaled_attentions(model: Any, scales: Scales) -> Iterator[None]:
    """Have the eager model add ``(scale - 1) * a`` in the place of what these attentions give; they fill their caches."""
    model._compiled_call_impl = None
    handles: list[Any] = []
    before: dict[Any, torch.Tensor] = {}

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        before[module] = args[0]

    for path, scale in scales.items():
        layer = model.get_submodule(path.rpartition(".")[0])
        last = layer.post_attention_layernorm if hasattr(layer, "pre_feedforward_layernorm") else layer.self_attn

        def replaced(_: Any, __: Any, result: Any, norm: Any = layer.input_layernorm, by: float = scale - 1) -> Any:
            return (by * before[norm], *result[1:]) if isinstance(result, tuple) else by * before[norm]

        handles += [layer.input_layernorm.register_forward_pre_hook(keep), last.register_forward_hook(replaced)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ramp_plan() -> SkipPlan:
    def skipped(path: str, scale: float) -> tuple[SkippedSublayer, ...]:
        return (SkippedSublayer(path, "", None, scale, None),)

    steps = (RampStep(2, skipped("model.layers.1.mlp", 0.9)), RampStep(5, skipped("model.layers.3.self_attn", 1.1)))
    return replace(SkipPlan.from_scales(ONE), ramp=steps)


def window_plan() -> SkipPlan:
    return replace(SkipPlan.from_scales(ONE, window=3), beta=-1.0)  # every FFN is added after the window
