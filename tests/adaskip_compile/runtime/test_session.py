"""A graph serves the model, and the part of it, that it was captured from: weights are inputs, so it could serve others."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.files.model_identity import identify
from tests.models import tiny, tokens
from tests.reference import omit_sublayers

FFN = {"model.layers.0.mlp": 0.9}
BOTH = {"model.layers.1.self_attn": 0.9, "model.layers.2.mlp": 1.1}


@pytest.fixture
def llama():
    return tiny("llama", num_hidden_layers=3)


@torch.no_grad()
def call(model, **how):
    return model(tokens(1, 9), **how)


def test_models_of_equal_shapes_have_sessions_of_their_own(llama):
    other = tiny("llama", num_hidden_layers=3, seed=1)
    for model in (llama, other):
        with omit_sublayers(model, BOTH):
            wanted = call(model).logits
        model.compile(backend="adaskip", options={"plan": SkipPlan.from_scales(BOTH), "inner": "eager"})
        torch.testing.assert_close(call(model).logits, wanted)
    for model in (llama, other):
        assert len(adaskip_compile.report(model).requests) == 1


def test_a_plan_for_one_model_is_refused_by_another_of_equal_shapes(llama, tmp_path):
    other = tiny("llama", num_hidden_layers=3, seed=1)
    profile = adaskip_compile.profile(llama, [tokens(1, 9)])
    assert profile.model == identify(llama) != identify(other)
    adaskip_compile.plan(profile, skip=1).save(tmp_path / "plan.json")
    options = {"plan": str(tmp_path / "plan.json"), "inner": "eager"}
    llama.compile(backend="adaskip", options=options)
    other.compile(backend="adaskip", options=options)
    call(llama)
    with pytest.raises(BackendCompilerFailed, match=r"ForeignFileError: .*plan\.json was made for another"):
        call(other)


def test_what_was_captured_of_one_layer_does_not_skip_in_the_others(llama):
    wanted = call(llama, output_attentions=True).logits
    adaskip_compile.compile(llama, SkipPlan.from_scales(FFN), inner="eager")
    # Weights of attention break the capture of SDPA: each layer is captured on its own, and runs for all.
    torch.testing.assert_close(call(llama, output_attentions=True).logits, wanted)
    [session] = adaskip_compile.report(llama).sessions
    assert not session.graphs
    assert any("a piece of each of the 3 LlamaDecoderLayers; runs unskipped" in note for note in session.notes)


def test_hidden_states_are_those_of_the_skipping_model(llama):
    with omit_sublayers(llama, BOTH):
        wanted = call(llama, output_hidden_states=True)
    adaskip_compile.compile(llama, SkipPlan.from_scales(BOTH), inner="eager")
    got = call(llama, output_hidden_states=True)
    torch.testing.assert_close(got.logits, wanted.logits)
    torch.testing.assert_close(got.hidden_states, wanted.hidden_states)
