"""Plans in which attentions see a window for the body of a prompt, through the driver, against both references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.inspection.inspection import inspect_model
from adaskip_compile.planning.plan_difference import differences
from adaskip_compile.planning.prompt_skips import PromptSkips
from adaskip_passes.errors import PlanError, UnknownSublayerError
from adaskip_passes.ir.module_paths import naming
from tests.adaskip_compile.planning.test_prompt_skips import BODY, HEAD, MAPS, SCALES, TAIL, body_plan, model_of
from tests.generation import CACHES, generate, left_padded, make_cache
from tests.models import tokens
from tests.reference import body_backend, replace_body, run_request

WINDOWS = {"model.layers.0.self_attn": 5, "model.layers.1.self_attn": 9}
WINDOWED = replace(BODY, windows=WINDOWS)


def windowed_plan() -> SkipPlan:
    plan = body_plan()
    assert plan.prompt is not None
    return replace(plan, prompt=replace(plan.prompt, windows=WINDOWS))


def windows_alone(path: str = "model.layers.1.self_attn", window: int = 9) -> SkipPlan:
    return replace(SkipPlan.none(), prompt=PromptSkips((), head=HEAD, tail=TAIL, windows={path: window}))


@pytest.fixture
def llama() -> Any:
    torch._dynamo.reset()
    return model_of("llama")


def step_logits(model: Any, call: Any, cache: str = "dynamic") -> torch.Tensor:
    return torch.stack(run_request(call, tokens(2, 40), tokens(2, 3, seed=1), cache=make_cache(cache, model)))


@pytest.mark.shares_captures
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_logits_are_those_of_both_references(family: str, cache: str) -> None:
    model = model_of(family)
    with torch.no_grad():
        with replace_body(model, BODY):
            seeing_all = step_logits(model, model, cache)
        with replace_body(model, WINDOWED):
            wanted = step_logits(model, model, cache)
        backend = naming(model, body_backend(WINDOWED))
        interpreted = step_logits(model, torch.compile(model, backend=backend, dynamic=True), cache)
    torch._dynamo.reset()
    adaskip_compile.compile(model, windowed_plan(), inner="eager")
    torch.testing.assert_close(step_logits(model, model, cache), wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(interpreted, wanted, rtol=2e-5, atol=2e-5)
    assert (wanted - seeing_all).abs().max() > 1e-3, "windows must show"
    report = adaskip_compile.report(model)
    [request] = report.requests
    assert (request.prompt_skipped, request.prompt_windows) == (SCALES, WINDOWS)
    assert "5 skipped, 2 attentions within a window for 35 of 40 tokens" in str(report)
    assert not any("window" in note for note in report.sessions[0].notes)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_windows_alone(llama: Any, inner: str) -> None:
    body = replace(BODY, replacements={}, windows={"model.layers.1.self_attn": 9})
    with torch.no_grad(), replace_body(llama, body):
        wanted = step_logits(llama, llama)
    adaskip_compile.compile(llama, windows_alone(), inner=inner)
    torch.testing.assert_close(step_logits(llama, llama), wanted, rtol=5e-5, atol=5e-5)


def test_generate(llama: Any) -> None:
    ids = tokens(2, 40)
    with replace_body(llama, WINDOWED):
        wanted = generate(llama, ids, torch.ones_like(ids), 6)
    adaskip_compile.compile(llama, windowed_plan(), inner="eager")
    assert torch.equal(generate(llama, ids, torch.ones_like(ids), 6), wanted)


def test_padded_rows_see_all_and_the_report_says_so(llama: Any) -> None:
    """Their mask says more than causality, so the window is not used: nothing is hidden that should be seen."""
    ids, mask = left_padded([tokens(1, 40)[0], tokens(1, 33, seed=2)[0]])
    forced = tokens(2, 3, seed=1)

    def run() -> torch.Tensor:
        return torch.stack(run_request(llama, ids, forced, cache=make_cache("dynamic", llama), mask=mask))

    with torch.no_grad(), replace_body(llama, BODY):
        wanted = run()
    adaskip_compile.compile(llama, windowed_plan(), inner="eager")
    torch.testing.assert_close(run(), wanted, rtol=2e-5, atol=2e-5)
    assert "model.layers.0.self_attn: its attention is not known to be causal" in str(adaskip_compile.report(llama))


def test_an_attention_with_a_window_of_its_own_keeps_it() -> None:
    torch._dynamo.reset()
    model = model_of("gemma3_text")
    assert model.config.layer_types[0] == "sliding_attention"
    with torch.no_grad():
        wanted = step_logits(model, model)
    adaskip_compile.compile(model, windows_alone("model.layers.0.self_attn", 3), inner="eager")
    torch.testing.assert_close(step_logits(model, model), wanted, rtol=2e-5, atol=2e-5)


def test_inspect_tells_what_is_left_of_it() -> None:
    path = "model.layers.1.self_attn"
    found = inspect_model(model_of("llama"), plan=windows_alone(path, 8))
    assert set(found.body_left) == {path}
    assert 0 < found.saved_shares("prefill", 1000)[path] < 1


class TestPlans:
    def test_file(self, tmp_path: Any) -> None:
        plan = windowed_plan()
        plan.save(tmp_path / "plan.json")
        assert SkipPlan.load(tmp_path / "plan.json") == plan

    def test_describe(self) -> None:
        text = windowed_plan().describe()
        assert "skips 5 sublayers and looks back no further than a window in 2 attentions for all but its first" in text
        assert "a window of 5 tokens: model.layers.0.self_attn" in text
        assert (
            windows_alone().describe().startswith("the prompt looks back no further than a window in 1 attention for")
        )

    def test_difference(self) -> None:
        found = {one.what: one for one in differences(SkipPlan.none(), windows_alone())}["model.layers.1.self_attn"]
        assert (found.one, found.other) == ("runs", "prompt, sees 9 tokens")

    def test_senseless(self) -> None:
        with pytest.raises(PlanError, match=r"skips model\.layers\.2\.self_attn, and a window is given for it"):
            PromptSkips(body_plan().prompt.skipped, MAPS, windows={"model.layers.2.self_attn": 4})  # type: ignore[union-attr]
        with pytest.raises(PlanError, match="the window of x is 0; it takes a number of tokens, 1 or more"):
            PromptSkips((), windows={"x": 0})
        with pytest.raises(PlanError, match="with a hole in the cache, and with its keys and values kept"):
            replace(SkipPlan.from_scales({"model.layers.1.self_attn": 1.0}), prompt=windows_alone().prompt)

    def test_a_model_without_that_sublayer(self, llama: Any) -> None:
        with pytest.raises(UnknownSublayerError, match=r"model\.layers\.9\.self_attn"):
            adaskip_compile.compile(llama, windows_alone("model.layers.9.self_attn"))
