"""Tuning brings what a model predicts that skips nearer to the full model, throughout and in prompts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.fitting.sequence import fit_prompt_skips
from adaskip_compile.planning.compensated_plans import compensated
from adaskip_compile.planning.prompt_skips import Trade
from adaskip_compile.planning.quality import Quality
from adaskip_passes.errors import OptionError, ProfileError
from tests.adaskip_compile.fitting.samples import SAMPLES
from tests.models import tokens

PROMPTS = [tokens(1, 240, seed=seed)[0] for seed in range(4)]
AFTER = 64


@pytest.fixture(scope="module")
def compensated_plan(llama, profile):
    fitted = adaskip_compile.fit(llama, profile, SAMPLES, rank=8, progress=False)
    return compensated(adaskip_compile.plan(profile, skip=3, window=0), fitted, "low_rank")


def predictions(model, plan, sample):
    adaskip_compile.compile(model, plan, inner="eager")
    with torch.no_grad():
        found = model(sample[None]).logits.log_softmax(-1)
    model._compiled_call_impl = None
    return found


def test_tuning_brings_predictions_nearer_to_the_full_models(llama, compensated_plan):
    # The same text over and over, held out as well: what is tried here is the descent, not how far it carries.
    samples = [SAMPLES[0]] * 4
    tuned = adaskip_compile.tune(llama, compensated_plan, samples, steps=40, tokens=40, progress=False)
    full = predictions(llama, SkipPlan.none(), SAMPLES[0])
    before, after = (
        (full.exp() * (full - predictions(llama, plan, SAMPLES[0]))).sum(-1).mean().item()
        for plan in (compensated_plan, tuned)
    )
    assert after < 0.8 * before
    assert tuned.paths == compensated_plan.paths
    assert all(one.error is None for one in tuned.maps.values())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in llama.parameters())


def test_tuning_that_does_not_help_changes_nothing(llama, compensated_plan):
    tuned = adaskip_compile.tune(llama, compensated_plan, SAMPLES, steps=1, tokens=2, progress=False)
    assert tuned is compensated_plan or tuned.maps != compensated_plan.maps


def test_what_cannot_be_tuned_is_an_error(llama, profile, compensated_plan):
    with pytest.raises(OptionError, match="no maps"):
        adaskip_compile.tune(llama, adaskip_compile.plan(profile, skip=2), SAMPLES)
    with pytest.raises(OptionError, match="steps="):
        adaskip_compile.tune(llama, compensated_plan, SAMPLES, steps=0)
    with pytest.raises(OptionError, match=r"rate=0: takes a number above 0"):
        adaskip_compile.tune(llama, compensated_plan, SAMPLES, rate=0)
    with pytest.raises(ProfileError, match="two samples"):
        adaskip_compile.tune(llama, compensated_plan, SAMPLES[:1])


@pytest.fixture(scope="module")
def prompt_plan(llama):
    skipped = ["model.layers.1.mlp", "model.layers.2.self_attn", "model.layers.2.mlp"]
    windows = {"model.layers.1.self_attn": 16}
    skips = fit_prompt_skips(llama, skipped, PROMPTS, rank=8, windows=windows, progress=False)
    return replace(SkipPlan.none(), prompt=skips)


@torch.no_grad()
def after_the_prompt(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities after each of the last 64 tokens of ``ids``, the others being a prompt; with a cache, as requests do it."""
    cache = model(ids[None, :-AFTER], use_cache=True).past_key_values
    return model(ids[None, -AFTER:], past_key_values=cache).logits[0].log_softmax(-1)


def test_maps_of_a_prompt_are_tuned_by_what_is_said_after_it(llama, prompt_plan):
    samples = [PROMPTS[0]] * 4
    tuned = adaskip_compile.tune(llama, prompt_plan, samples, steps=40, tokens=240, rate=0.03, progress=False)
    full = after_the_prompt(llama, PROMPTS[0])
    found = []
    for plan in (prompt_plan, tuned):
        adaskip_compile.compile(llama, plan, inner="eager")
        got = after_the_prompt(llama, PROMPTS[0])
        [request] = adaskip_compile.report(llama).requests[-1:]
        assert tuple(request.prompt_skipped) == prompt_plan.prompt.paths
        assert request.prompt_windows == {"model.layers.1.self_attn": 16}
        found.append((full.exp() * (full - got)).sum(-1).mean().item())
        adaskip_compile.restore(llama)
    before, after = found
    assert after < 0.8 * before
    assert tuned.prompt is not None
    assert tuned.prompt.paths == prompt_plan.prompt.paths
    assert tuned.prompt.windows == prompt_plan.prompt.windows
    assert all(one.error is None for one in tuned.prompt.maps.values())


def test_what_was_measured_of_a_plan_does_not_stay_with_its_tuned_maps(llama, prompt_plan):
    trade = Trade(1, 2, 1.5, True, Quality(0.01, 0.001))
    measured = replace(prompt_plan, prompt=replace(prompt_plan.prompt, measured=trade, frontier=(trade,)))
    tuned = adaskip_compile.tune(llama, measured, [PROMPTS[0]] * 4, steps=5, tokens=240, progress=False)
    assert tuned.prompt is not None
    assert tuned.prompt.maps != measured.prompt.maps
    assert tuned.prompt.measured is None
    assert tuned.prompt.frontier == ()


def test_a_prompt_that_is_too_short_is_an_error(llama, prompt_plan):
    with pytest.raises(ProfileError, match="a sample has 40 tokens; tuning this plan needs 193"):
        adaskip_compile.tune(llama, prompt_plan, SAMPLES)
