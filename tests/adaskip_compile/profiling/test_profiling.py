"""Offline profiles against hooks on the eager model, and what cannot be profiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import adaskip_compile
from adaskip_compile import CaptureError, Profile, ProfileError, SkipPlan
from adaskip_compile.costs.timers import cost_at
from adaskip_compile.files.model_identity import identify
from adaskip_compile.inspection.inspection import inspect_model
from tests.models import plain, tiny, tokens
from tests.reference import hook_statistics, measure
from tests.tiny_checkpoints import byte_tokenizer

COLUMNS = ("similarity", "scale_token", "scale_frobenius")
SAMPLES = [tokens(1, 9)[0], tokens(1, 23, seed=1)[0], tokens(2, 12, seed=2)]


@pytest.fixture
def llama():
    return tiny("llama", num_hidden_layers=3)


def test_a_profile_is_what_hooks_measure(llama):
    profile = adaskip_compile.profile(llama, SAMPLES, progress=False)
    with hook_statistics(llama) as calls, torch.no_grad():
        for sample in SAMPLES:
            llama(sample if sample.dim() == 2 else sample[None])
    assert [sublayer.path for sublayer in profile.sublayers] == [
        f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn", "mlp")
    ]
    for sublayer in profile.sublayers:
        attention = sublayer.path.endswith("self_attn")
        assert (sublayer.kind, sublayer.stateful) == (("attention", True) if attention else ("ffn", False))
        assert sublayer.tokens == (9, 23, 24)
        for name in COLUMNS:
            wanted = [getattr(call[sublayer.path], name) for call in calls]
            assert getattr(sublayer, name) == pytest.approx(wanted, abs=1e-5)
    profile.check(identify(llama))


def test_whole_layers_are_what_hooks_measure(llama):
    seen = []
    handles = [
        layer.register_forward_hook(lambda _, args, result: seen.append(measure(args[0], result).similarity))
        for layer in llama.model.layers
    ]
    with torch.no_grad():
        for sample in SAMPLES:
            llama(sample if sample.dim() == 2 else sample[None])
    for handle in handles:
        handle.remove()
    profile = adaskip_compile.profile(llama, SAMPLES, progress=False)
    assert [layer.paths for layer in profile.layers] == [
        (f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp") for layer in range(3)
    ]
    for number, layer in enumerate(profile.layers):
        assert layer.similarity == pytest.approx(seen[number::3], abs=1e-5)
    merged = profile.merge(profile)
    assert merged.layers[1].mean_similarity == pytest.approx(profile.layers[1].mean_similarity)
    assert profile.merge(replace(profile, layers=())).layers == ()


@pytest.mark.newest("older ones capture how masks are made")
def test_costs_are_those_of_an_inspection(llama, tmp_path):
    """Of a prefill exactly; of a decoded token but for the causal mask, of which the estimate takes a prefill's share."""
    profile = adaskip_compile.profile(llama, SAMPLES[:1], progress=False)
    costs, found = profile.costs, inspect_model(llama)
    assert costs is not None
    assert [(one.path, one.group) for one in costs.sublayers] == [(one.path, one.group) for one in found.sublayers]
    assert (costs.width, costs.element_bytes, costs.device) == (64, 4, "cpu")
    for ours, theirs in zip(costs.groups, found.groups, strict=True):
        assert (ours.kind, ours.count) == (theirs.kind, theirs.count)
        assert cost_at(ours.cost["prefill"], "prefill", 100) == cost_at(theirs.cost["prefill"], "prefill", 100)
        estimate, exact = (cost_at(one.cost["decode"], "decode", 100) for one in (ours, theirs))
        assert estimate["flops"] == exact["flops"]
        assert estimate["weight_bytes"] == exact["weight_bytes"]
        assert estimate["activation_bytes"] == pytest.approx(exact["activation_bytes"], rel=0.01)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert adaskip_compile.plan(profile, speedup=1.2, context=64).policy == "adaskip"


def test_profiling_leaves_the_model_as_it_was(llama):
    adaskip_compile.compile(llama, SkipPlan.none(), inner="eager")
    compiled = llama._compiled_call_impl
    llama.train()
    before = adaskip_compile.profile(llama, SAMPLES[:1], progress=False)
    assert llama.training
    assert llama._compiled_call_impl is compiled
    assert not adaskip_compile.report(llama).requests
    llama.eval()
    assert adaskip_compile.profile(llama, SAMPLES[:1], progress=False) == before


def test_texts_are_tokenized_and_at_most_the_asked_number_is_read():
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    texts = iter(["some text", "another one", "and a third"])
    profile = adaskip_compile.profile(model, texts, tokenizer=tokenizer, max_samples=2, progress=False)
    assert profile.sublayers[0].tokens == (9, 11)
    assert next(texts) == "and a third"


def test_a_decoder_of_no_library(llama):
    profile = adaskip_compile.profile(plain(), [tokens(1, 9)[0]], progress=False)
    assert {sublayer.kind for sublayer in profile.sublayers} == {"attention", "ffn"}


def test_no_bar_where_nobody_watches(llama, capfd):
    adaskip_compile.profile(llama, SAMPLES[:2])
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_profiled_is_refused(llama):
    with pytest.raises(ProfileError, match="sample 0 is text: pass tokenizer=, or token ids"):
        adaskip_compile.profile(llama, ["text"], progress=False)
    with pytest.raises(ProfileError, match="sample 1 has 1 tokens; prefill needs at least 2"):
        adaskip_compile.profile(llama, [tokens(1, 9)[0], tokens(1, 1)[0]], progress=False)
    with pytest.raises(ProfileError, match="no samples to profile on"):
        adaskip_compile.profile(llama, [], progress=False)
    llama.train()
    with pytest.raises(ProfileError):
        adaskip_compile.profile(llama, [], progress=False)
    assert llama.training


def test_a_model_without_a_residual_stream_is_refused():
    model = nn.Sequential(nn.Embedding(128, 16), nn.Linear(16, 128)).eval()
    with pytest.raises(CaptureError, match="nothing to profile: "):
        adaskip_compile.profile(model, SAMPLES[:1], progress=False)


class Broken(nn.Module):
    """A decoder whose forward Dynamo cannot capture as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = plain()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(ids)
        torch._dynamo.graph_break()
        return logits * 2


def test_a_model_in_pieces_is_refused():
    with pytest.raises(CaptureError, match="captured in 2 pieces"):
        adaskip_compile.profile(Broken().eval(), SAMPLES[:1], progress=False)
