"""Plans that skip for the body of a prompt and keep keys and values, through the driver, against both references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.compensation import StreamMap
from adaskip_compile.plans import SkippedSublayer
from adaskip_compile.prompt_skips import PromptSkips
from tests.generation import CACHES, make_cache
from tests.models import tiny, tokens
from tests.reference import Body, body_backend, replace_body, run_request

FAMILIES = ["llama", "qwen3", "gemma3_text", "mixtral"]
HEAD, TAIL = 1, 4
SCALES = {
    "model.layers.1.mlp": 0.9,
    "model.layers.2.self_attn": 1.1,
    "model.layers.2.mlp": 0.8,
    "model.layers.3.self_attn": 1.2,
    "model.layers.3.mlp": 0.7,
}


def a_map(seed: int, rank: int = 4, width: int = 64) -> StreamMap:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down": (rank, width), "up": (width, rank), "shift": (width,)}
    return StreamMap(
        "low_rank", {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}, None
    )


MAPS = {"model.layers.2.mlp": a_map(0), "model.layers.3.self_attn": a_map(1)}
BODY = Body({path: MAPS.get(path, lambda a, scale=scale: scale * a) for path, scale in SCALES.items()}, HEAD, TAIL)


def body_plan(**changes: Any) -> SkipPlan:
    skipped = tuple(SkippedSublayer(path, "", None, scale, None) for path, scale in SCALES.items())
    return replace(SkipPlan.none(), prompt=PromptSkips(skipped, MAPS, HEAD, TAIL), **changes)


def model_of(family: str) -> Any:
    how: dict[str, Any] = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3_text" else {}
    )
    return tiny(family, num_hidden_layers=4, **how)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_both_references(family: str, cache: str) -> None:
    model, prompt, forced = model_of(family), tokens(2, 40), tokens(2, 3, seed=1)

    def run(call: Any) -> torch.Tensor:
        return torch.stack(run_request(call, prompt, forced, cache=make_cache(cache, model)))

    with torch.no_grad():
        full = run(model)
        with replace_body(model, BODY):
            wanted = run(model)
        interpreted = run(torch.compile(model, backend=body_backend(BODY), dynamic=True))
    torch._dynamo.reset()
    adaskip_compile.compile(model, body_plan(), inner="eager")
    got = run(model)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(interpreted, wanted, rtol=2e-5, atol=2e-5)
    assert ((got - full).abs().amax(dim=(1, 2)) > 2e-3).all(), "skipping must show in every step"
    [request] = adaskip_compile.report(model).requests
    assert request.body_tokens == 40 - HEAD - TAIL
    assert request.prompt_skipped == SCALES
