"""The joint order, held against divergences that are computed eagerly, with sublayers left out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

import adaskip_compile
from adaskip_compile.planning.compensated_plans import compensated
from adaskip_passes.errors import OptionError, ProfileError
from tests.adaskip_compile.fitting.samples import SAMPLES
from tests.reference import omit_sublayers


@torch.no_grad()
def divergence(model, scales):
    """The mean divergence at every eighth token, as the joint order measures it."""
    found = []
    for sample in SAMPLES:
        full = model(sample[None]).logits.log_softmax(-1)
        with omit_sublayers(model, scales):
            skipping = model(sample[None]).logits.log_softmax(-1)
        found.append((full.exp() * (full - skipping)).sum(-1)[0, 7::8])
    return torch.cat(found).mean().item()


def test_losses_are_those_of_the_model_that_omits_what_the_order_says(llama, profile):
    found = adaskip_compile.order_by_loss(llama, profile, SAMPLES, most=4, candidates=8, progress=False)
    scales = {each.path: each.mean_scale() for each in profile.sublayers}
    chosen: dict[str, float] = {}
    for step in found.joint_order:
        chosen[step.path] = scales[step.path]
        assert step.loss == pytest.approx(divergence(llama, chosen), rel=1e-3, abs=1e-5)
    assert len(chosen) == 4


def test_each_step_takes_what_costs_least(llama, profile):
    [first, second] = adaskip_compile.order_by_loss(
        llama, profile, SAMPLES, most=2, candidates=8, progress=False
    ).joint_order
    scales = {each.path: each.mean_scale() for each in profile.sublayers}
    alone = {path: divergence(llama, {path: scale}) for path, scale in scales.items()}
    assert first.path == min(alone, key=alone.__getitem__)
    pairs = {pair: divergence(llama, {path: scales[path] for path in pair}) for pair in combinations(scales, 2)}
    assert second.loss <= min(loss for pair, loss in pairs.items() if first.path in pair) * 1.2


def test_compensation_lowers_the_loss_and_the_model_stays_as_it_was(llama, profile):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    compiled = llama._compiled_call_impl
    fitted = adaskip_compile.fit(llama, profile, SAMPLES, rank=16, progress=False)
    by = {
        how: adaskip_compile.order_by_loss(llama, fitted, SAMPLES, compensation=how, most=3, progress=False)
        for how in ("none", "scale", "low_rank")
    }
    assert by["low_rank"].joint_order[-1].loss < by["scale"].joint_order[-1].loss
    assert llama._compiled_call_impl is compiled
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_one_attention_always_stays(llama, profile):
    attentions = [each for each in profile.sublayers if each.kind == "attention"]
    likely = replace(profile, sublayers=tuple(
        replace(each, similarity=(1.0,) * each.samples) if each in attentions else each for each in profile.sublayers
    ))  # fmt: skip
    found = adaskip_compile.order_by_loss(llama, likely, SAMPLES[:1], most=4, candidates=4, progress=False)
    assert len(found.joint_order) == 3


def test_an_order_of_nothing_is_an_error(llama, profile):
    with pytest.raises(OptionError, match="most="):
        adaskip_compile.order_by_loss(llama, profile, SAMPLES, most=8)
    with pytest.raises(OptionError, match="no such map"):
        compensated(adaskip_compile.plan(profile, skip=2), profile, "affine")
    with pytest.raises(ProfileError, match="no samples"):
        adaskip_compile.order_by_loss(llama, profile, [], most=2)


def test_an_order_is_kept_in_the_profiles_file(llama, profile, tmp_path):
    fitted = adaskip_compile.fit(llama, profile, SAMPLES, rank=4, progress=False)
    ordered = adaskip_compile.order_by_loss(llama, fitted, SAMPLES[:1], most=2, progress=False)
    ordered.save(tmp_path / "profile.json")
    assert adaskip_compile.Profile.load(tmp_path / "profile.json") == ordered
    assert ordered.merge(profile).joint_order == ordered.joint_order
    assert ordered.merge(ordered).joint_order == ()
