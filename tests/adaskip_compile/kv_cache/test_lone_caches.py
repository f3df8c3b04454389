"""Models with caches of two kinds, of which all attentions of one kind are skipped: no kept one gives them their shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.adaskip_compile.kv_cache.requests_alone import IDS, assert_same, go_on, scaled_attentions, use
from tests.generation import CACHES, generate, make_cache
from tests.models import FAMILIES, tiny, tokens
from tests.reference import run_request

FULL = {"model.layers.1.self_attn": 0.9, "model.layers.3.self_attn": 1.05}
TYPES = ["sliding_attention", "full_attention"] * 2


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Keep captures for a whole module: all plans share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=["gemma3_text", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> Any:
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}
    FAMILIES.setdefault("gpt_oss", mixture)
    return tiny(request.param, num_hidden_layers=4, layer_types=TYPES)


def both(model: Any, act: Callable[[Callable[[], None]], Any]) -> tuple[Any, Any]:
    """Return what ``act`` gives with all full attentions skipped, and on the eager model that adds their scale alone."""
    with scaled_attentions(model, FULL):
        wanted = act(lambda: None)
    use(model, FULL)
    return act(lambda: use(model, {"model.layers.0.self_attn": 0.8})), wanted


def begun(model: Any, kind: str) -> Any:
    cache = make_cache(kind, model)
    run_request(model, tokens(2, 9), tokens(2, 3, seed=1), cache=cache)
    return cache


@pytest.mark.parametrize("kind", CACHES)
def test_a_copy_and_its_original_go_on(model: Any, kind: str) -> None:
    def act(switch: Callable[[], None]) -> torch.Tensor:
        cache = begun(model, kind)
        twin = copy.deepcopy(cache)
        switch()
        first = go_on(model, twin, IDS)
        cache.reorder_cache(torch.tensor([1, 0]))
        return torch.stack([first, go_on(model, cache, IDS)])

    assert_same(*both(model, act))


def test_rows_are_selected(model: Any) -> None:
    def act(switch: Callable[[], None]) -> torch.Tensor:
        cache = begun(model, "dynamic")
        switch()
        cache.batch_select_indices(torch.tensor([1]))
        first = go_on(model, cache, IDS[:1, :2])
        cache.batch_repeat_interleave(2)
        return torch.cat([first.expand(-1, 2, -1), go_on(model, cache, IDS)])

    assert_same(*both(model, act))


@pytest.mark.parametrize("kind", CACHES)
def test_beam_search(model: Any, kind: str) -> None:
    def act(_: Callable[[], None]) -> torch.Tensor:
        ids = tokens(2, 9)
        return generate(model, ids, torch.ones_like(ids), 8, num_beams=3, cache=make_cache(kind, model))

    got, wanted = both(model, act)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", CACHES)
def test_what_a_skipped_attention_leaves_is_defined(model: Any, kind: str) -> None:
    use(model, FULL)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written then holds NaN
    try:
        cache = begun(model, kind)
    finally:
        torch.use_deterministic_algorithms(False)
    for layer in cache.layers:
        for entry in (layer.keys, layer.values):
            assert bool(entry.isfinite().all())
    assert not bool(cache.layers[1].keys.any())
