"""Nothing is captured or compiled anew once a model is warm, and no state is shared by accident."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.capture.dynamo import capture_count
from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_compile.runtime import variants
from tests.generation import CACHES, generate, make_cache
from tests.models import tiny, tokens
from tests.reference import omit_sublayers, run_request

LAYERS = 4
PLAN = replace(
    SkipPlan.from_scales({"model.layers.1.self_attn": 0.97, "model.layers.2.mlp": 1.02}, window=3), beta=-2.0
)
# README: a prefill graph for each cache and batch class, and at most two for decoding.
GRAPHS_PER_CLASS = 3


@pytest.fixture
def llama():
    return tiny("llama", num_hidden_layers=LAYERS)


def counts(model: Any) -> tuple[int, int, int]:
    """Return how many graphs Dynamo captured, how many of them are this model's, and how many variants there are."""
    graphs = [graph for session in adaskip_compile.report(model).sessions for graph in session.graphs]
    return capture_count(), len(graphs), sum(len(graph.variants) for graph in graphs)


def eager(model: Any, scales: dict[str, float], prompt: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    with omit_sublayers(model, scales):
        logits = run_request(model, prompt, forced, cache=make_cache("dynamic", model))
    model._compiled_call_impl = compiled
    return torch.stack(logits)


def assert_same(got: list[torch.Tensor], wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.stack(got), wanted, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def call(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the last token after one more call on ``cache``."""
    seen = int(cache.get_seq_length())
    positions = torch.arange(seen, seen + ids.shape[1])[None]
    return model(ids, position_ids=positions, use_cache=True, **cache_argument(model, cache)).logits[:, -1]


@pytest.mark.parametrize("kind", CACHES)
def test_requests_of_any_length_share_graphs_and_variants(llama, kind):
    adaskip_compile.compile(llama, PLAN, inner="eager")
    cache = make_cache(kind, llama)

    def request(length: int) -> None:
        ids = tokens(1, length, seed=length)
        own = cache if kind == "static" else make_cache(kind, llama)
        if kind == "static":
            cache.reset()
        generate(llama, ids, torch.ones_like(ids), 8, cache=own)

    for length in (17, 12):  # a preallocated cache has made its buffers by the second request
        request(length)
    warm = counts(llama)
    assert 2 <= warm[1] <= GRAPHS_PER_CLASS
    for length in (9, 14, 23, 31, 60):
        request(length)
    assert counts(llama) == warm
    report = adaskip_compile.report(llama)
    assert [item.tokens["prefill"] for item in report.requests] == [17, 12, 9, 14, 23, 31, 60]
    assert all(item.tokens["window"] == 3 and item.tokens["steady"] == 4 for item in report.requests)
    assert all(len(item.extra) == LAYERS - 1 for item in report.requests)


def test_a_switch_of_plan_captures_nothing(llama):
    adaskip_compile.compile(llama, PLAN, inner="eager")
    prompt, forced = tokens(1, 9), tokens(1, 3, seed=1)
    run_request(llama, prompt, forced, cache=make_cache("dynamic", llama))
    warm = counts(llama)
    paths = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in ("self_attn", "mlp")]
    draw = random.Random(0)
    for _ in range(30):
        chosen = [path for path in draw.sample(paths, draw.randint(1, 6)) if path != "model.layers.3.self_attn"]
        scales = {path: draw.uniform(0.9, 1.1) for path in chosen}
        adaskip_compile.compile(llama, SkipPlan.from_scales(scales), inner="eager")
        got = run_request(llama, prompt, forced, cache=make_cache("dynamic", llama))
        assert_same(got, eager(llama, scales, prompt, forced))
        assert counts(llama)[:2] == warm[:2]


def test_only_the_last_variants_are_kept(llama, monkeypatch):
    monkeypatch.setattr(variants, "_VARIANTS", 2)
    prompt, forced = tokens(1, 9), tokens(1, 3, seed=1)
    plans = [{f"model.layers.{layer}.mlp": 0.9} for layer in (0, 1, 2, 3, 0)]
    for scales in plans:
        adaskip_compile.compile(llama, SkipPlan.from_scales(scales), inner="eager")
        got = run_request(llama, prompt, forced, cache=make_cache("dynamic", llama))
        assert_same(got, eager(llama, scales, prompt, forced))
    graphs = [graph for session in adaskip_compile.report(llama).sessions for graph in session.graphs]
    assert graphs
    assert all(1 <= len(graph.variants) <= 2 for graph in graphs)


def test_every_class_of_every_model_is_captured(llama):
    """Dynamo counts graphs by code object, which models share; past its limit it would run them unskipped."""
    other = tiny("llama", num_hidden_layers=2, seed=1)
    scales = {"model.layers.1.self_attn": 0.97}
    adaskip_compile.compile(llama, SkipPlan.from_scales(scales), inner="eager")
    other.compile(backend="adaskip", dynamic=True, options={"plan": SkipPlan.from_scales(scales), "inner": "eager"})
    for model in (llama, other):
        for kind in CACHES:
            for rows in (1, 2):
                cache = make_cache(kind, model)
                for _ in range(2):
                    prompt, forced = tokens(rows, 9), tokens(rows, 2, seed=1)
                    got = run_request(model, prompt, forced, cache=cache)
                    assert_same(got, eager(model, scales, prompt, forced))
                    cache = make_cache(kind, model) if kind == "dynamic" else (cache.reset() or cache)
        classes = len(CACHES) * 2
        assert counts(model)[1] <= classes * GRAPHS_PER_CLASS
        assert len(adaskip_compile.report(model).requests) == classes * 2
    assert capture_count() > 8  # Dynamo's limit as it comes


def test_requests_with_different_plans_take_turns(llama):
    plans: list[dict[str, float]] = [
        {"model.layers.0.self_attn": 0.95},
        {"model.layers.2.self_attn": 1.05, "model.layers.1.mlp": 0.98},
        {},
    ]
    prompts = [tokens(1, 9, seed=seed) for seed in range(3)]
    forced = tokens(1, 5, seed=9)
    caches = [make_cache("dynamic", llama) for _ in plans]
    got: list[list[torch.Tensor]] = [[] for _ in plans]
    for index, scales in enumerate(plans):
        adaskip_compile.compile(llama, SkipPlan.from_scales(scales), inner="eager")
        got[index].append(call(llama, caches[index], prompts[index]))
    for ids in forced.split(1, dim=1):
        for index, cache in enumerate(caches):
            got[index].append(call(llama, cache, ids))
    for index, scales in enumerate(plans):
        assert_same(got[index], eager(llama, scales, prompts[index], forced))


def test_two_models_in_two_threads():
    models = [tiny("llama", num_hidden_layers=LAYERS, seed=seed) for seed in (1, 2)]
    scales = [{"model.layers.1.self_attn": 0.97}, {"model.layers.2.self_attn": 1.03, "model.layers.0.mlp": 0.95}]
    requests = [[(tokens(1, 7 + n, seed=n + 50 * m), tokens(1, 6, seed=n)) for n in range(8)] for m in range(2)]
    wanted = [[eager(models[m], scales[m], *request) for request in requests[m]] for m in range(2)]
    for model, skipped in zip(models, scales, strict=True):
        adaskip_compile.compile(model, SkipPlan.from_scales(skipped), inner="eager")
        run_request(model, tokens(1, 12), tokens(1, 3), cache=make_cache("dynamic", model))
    warm = [counts(model) for model in models]
    got: list[list[list[torch.Tensor]]] = [[], []]
    together = threading.Barrier(2)

    def serve(m: int) -> None:
        for prompt, forced in requests[m]:
            together.wait(timeout=60)
            got[m].append(run_request(models[m], prompt, forced, cache=make_cache("dynamic", models[m])))

    threads = [threading.Thread(target=serve, args=(m,)) for m in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [counts(model) for model in models] == warm
    for m in range(2):
        assert len(got[m]) == len(wanted[m])
        for logits, reference in zip(got[m], wanted[m], strict=True):
            assert_same(logits, reference)
        assert all(request.skipped == scales[m] for request in adaskip_compile.report(models[m]).requests)
