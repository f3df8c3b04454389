"""On a CUDA device: whole requests, through Inductor, against the eager model and one that truly omits the sublayers."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.evaluation.timing import cache_bytes
from adaskip_compile.lowering.cuda_graphs import RecordedRun
from adaskip_compile.runtime.session import sessions_of
from tests.generation import CACHES, generate, left_padded, make_cache
from tests.models import tiny, tokens
from tests.reference import omit_sublayers, run_request

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STEPS = 24
SKIPPED = {"model.layers.0.self_attn": 0.97, "model.layers.2.mlp": 1.03, "model.layers.3.self_attn": 0.95}


def on_gpu(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    return tiny(family, num_hidden_layers=4, **overrides).to(DEVICE, dtype)


def padded(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    row = tokens(1, 40)[0]
    ids, mask = left_padded([row[3 * place :] for place in range(rows)])
    return ids.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_nothing_skipped_changes_no_token(family, kind):
    layers: dict[str, Any] = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3_text" else {}
    )
    model = on_gpu(family, **layers)
    requests = [padded(1), padded(2)]
    how = {"disable_compile": True}  # transformers compiles decode with a fixed cache by itself
    wanted = [generate(model, *one, STEPS, cache=make_cache(kind, model), **how) for one in requests]
    adaskip_compile.compile(model, SkipPlan.none())
    for request, tokens_wanted in zip(requests, wanted, strict=True):
        got = generate(model, *request, STEPS, cache=make_cache(kind, model), **how)
        assert torch.equal(got, tokens_wanted)
    assert not adaskip_compile.report(model).sessions[-1].unskipped_graphs


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)], ids=["fp32", "bf16"])
def test_skipped_sublayers_are_truly_omitted(kind, dtype, tolerance):
    model = on_gpu("llama", dtype)
    prompt, forced = tokens(2, 41).to(DEVICE), tokens(2, STEPS, seed=1).to(DEVICE)

    def run() -> torch.Tensor:
        cache = make_cache(kind, model)
        return torch.stack(run_request(model, prompt, forced, cache=cache)).float()

    full = run()
    with omit_sublayers(model, SKIPPED):
        wanted = run()
    adaskip_compile.compile(model, SkipPlan.from_scales(SKIPPED))
    got = run()
    assert adaskip_compile.report(model).requests[-1].skipped == SKIPPED
    assert (got - full).abs().max() > 2 * tolerance
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", [{"disable_compile": True}, {}], ids=["alone", "within-compiled-decode"])
def test_decode_over_a_fixed_cache_is_replayed(how):
    model = on_gpu("llama")
    plan = replace(SkipPlan.from_scales(SKIPPED, window=6), beta=-2.0)
    adaskip_compile.compile(model, plan)
    wanted = [generate(model, *padded(rows), STEPS) for rows in (1, 2, 1)]
    for rows, one in zip((1, 2, 1), wanted, strict=True):
        got = generate(model, *padded(rows), STEPS, cache=make_cache("static", model), **how)
        assert torch.equal(got, one)
    variants = [
        variant for session in sessions_of(model) for graph in session.graphs for variant in graph.variants.values()
    ]
    recorded = [one for one in variants if isinstance(one.run, RecordedRun) and one.run.replays]
    assert {bool(one.probed) for one in recorded} == {False, True}
    assert not adaskip_compile.report(model).sessions[-1].notes


def test_threads_share_a_recorded_step():
    model = on_gpu("llama")
    adaskip_compile.compile(model, SkipPlan.from_scales(SKIPPED))
    ids, mask = padded(1)
    requests = [(ids, mask), (ids.flip(1), mask)]
    wanted = [generate(model, *one, STEPS) for one in requests]
    found: dict[int, torch.Tensor] = {}

    def work(place: int) -> None:
        cache = make_cache("static", model)
        found[place] = generate(model, *requests[place], STEPS, cache=cache, disable_compile=True)

    work(0)
    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[place], one) for place, one in enumerate(wanted))


def test_the_window_adds_what_the_cpu_adds():
    plan = replace(SkipPlan.from_scales(SKIPPED, window=4), beta=-2.0)
    prompt, forced = tokens(1, 41), tokens(1, STEPS, seed=1)
    found = {}
    for device, inner in (("cpu", "eager"), (DEVICE, "inductor")):
        model = tiny("llama", num_hidden_layers=4).to(device)
        adaskip_compile.compile(model, plan, inner=inner)
        cache = make_cache("dynamic", model)
        logits = run_request(model, prompt.to(device), forced.to(device), cache=cache)
        found[device] = adaskip_compile.report(model).requests[-1].extra, torch.stack(logits).cpu()
    (extra, logits), (wanted, logits_wanted) = found[DEVICE], found["cpu"]
    assert len(wanted) == 3
    assert extra == pytest.approx(wanted, abs=1e-4)
    torch.testing.assert_close(logits, logits_wanted, rtol=1e-3, atol=1e-3)


def test_it_learns_and_then_skips():
    model = on_gpu("llama")
    adaskip_compile.compile(model, skip=3, learn=2, keep_captures=False)
    for _ in range(3):
        generate(model, *padded(1), 4)
    counts = [len(request.skipped) for request in adaskip_compile.report(model).requests]
    assert counts == [0, 0, 3]


def test_a_skipped_attention_holds_no_keys_and_values():
    model = on_gpu("llama")
    held = {}
    for name, plan in (("full", SkipPlan.none()), ("skipping", SkipPlan.from_scales(SKIPPED))):
        adaskip_compile.compile(model, plan)
        cache = make_cache("dynamic", model)
        generate(model, *padded(1), STEPS, cache=cache)
        held[name] = cache_bytes(cache)
    assert held["skipping"] == held["full"] / 2


def test_profile_and_plan_on_the_device():
    model = on_gpu("llama")
    samples = [tokens(1, 64, seed=seed).to(DEVICE) for seed in range(2)]
    found = adaskip_compile.profile(model, samples, progress=False)
    wanted = adaskip_compile.profile(model.cpu(), [sample.cpu() for sample in samples], progress=False)
    for one, other in zip(found.sublayers, wanted.sublayers, strict=True):
        assert one.path == other.path
        assert one.mean_scale() == pytest.approx(other.mean_scale(), rel=1e-4)
