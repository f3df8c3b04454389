"""A gated FFN is imitated by some of its own units: those that add most, read off its graph whatever its names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaskip_compile import SkipPlan
from adaskip_compile.fitting.sequence import SequenceFitter
from adaskip_passes.errors import OptionError
from adaskip_passes.stream.gated_units import find_gated_units
from tests.captures import shared_captures, stream_of
from tests.models import tiny, tokens
from tests.reference import decoder_layers

SAMPLES = tuple(tokens(1, 60, seed=seed)[0] for seed in range(12))
PATH = "model.layers.1.mlp"
UNITS = 96
SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mixtral": {},
}


def fitter(family: str) -> tuple[Any, SequenceFitter]:
    model = tiny(family, num_hidden_layers=3, **SIZES[family])
    return model, SequenceFitter(model, SAMPLES)


def layer_of(model: Any) -> Any:
    return dict(decoder_layers(model))["model.layers.1"]


def test_all_units_of_an_ffn_are_the_ffn() -> None:
    model, fit = fitter("llama")
    [found] = fit.fit([PATH], unit_share=1.0, progress=False).maps.values()
    assert found.form == "gated"
    assert found.error == pytest.approx(0, abs=1e-4)
    layer = layer_of(model)
    a = torch.randn(7, 64)
    with torch.no_grad():
        wanted = a + layer.mlp(layer.post_attention_layernorm(a))
    torch.testing.assert_close(found(a), wanted, rtol=1e-2, atol=2e-2)


def test_some_units_miss_less_than_a_low_rank_map_of_as_many_numbers() -> None:
    _, fit = fitter("llama")
    errors: list[float] = []
    for units in (0, 16, 48):
        [found] = fit.fit([PATH], rank=24, unit_share=units / UNITS, progress=False).maps.values()
        assert found.rank == (units or 24)
        errors.append(found.error or 0.0)
    assert errors == sorted(errors, reverse=True)


def test_a_gelu_gate_is_told_from_a_silu_gate() -> None:
    """Gemma norms what its FFN gives too, which no map imitates: with the wrong gate a third more would be missed."""
    _, fit = fitter("gemma3_text")
    [found] = fit.fit([PATH], unit_share=1.0, progress=False).maps.values()
    assert found.error is not None
    assert found.error < 0.1


def test_the_units_are_those_that_add_most() -> None:
    model, _ = fitter("llama")
    mlp = layer_of(model).mlp
    chosen = torch.tensor([3, 50, 95])
    with torch.no_grad():
        small = torch.ones(96, dtype=torch.bool)
        small[chosen] = False
        mlp.down_proj.weight[:, small] *= 1e-3
    [found] = SequenceFitter(model, SAMPLES).fit([PATH], unit_share=3 / UNITS, progress=False).maps.values()
    norm = layer_of(model).post_attention_layernorm.weight
    rows = found.tensors["gate"] / norm
    nearest = torch.cdist(rows, mlp.gate_proj.weight).argmin(-1)
    assert sorted(nearest.tolist()) == chosen.tolist()
    assert found.error == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.1.self_attn"])
def test_what_has_no_units_of_that_form_gets_a_low_rank_map(path: str) -> None:
    _, fit = fitter("mixtral")
    [found] = fit.fit([path], unit_share=16 / UNITS, progress=False).maps.values()
    assert found.form == "low_rank"


def test_units_are_found_in_gated_ffns_alone() -> None:
    found = {}
    for family in ("llama", "gemma3_text", "gpt2", "qwen3_moe"):
        [stream] = {stream_of(one.gm) for one in shared_captures(family)[:1]}
        found[family] = [find_gated_units(one) is not None for one in stream.sublayers if one.kind == "ffn"]
        assert not any(find_gated_units(one) for one in stream.sublayers if one.kind != "ffn")
    assert {family: {*ones} for family, ones in found.items()} == {
        "llama": {True},
        "gemma3_text": {True},
        "gpt2": {False},
        "qwen3_moe": {False},
    }


def test_a_plan_with_gated_maps_is_kept_in_a_file(tmp_path: Path) -> None:
    _, fit = fitter("llama")
    plan = replace(SkipPlan.none(), prompt=fit.fit([PATH], unit_share=8 / UNITS, progress=False))
    plan.save(tmp_path / "plan.json")
    again = SkipPlan.load(tmp_path / "plan.json")
    assert again.prompt == plan.prompt
    assert "gated of 8 units" in again.describe()


def test_a_senseless_share() -> None:
    _, fit = fitter("llama")
    with pytest.raises(OptionError, match=r"unit_share=1\.5: takes a share of an FFN's units, from 0 to 1"):
        fit.fit([PATH], unit_share=1.5, progress=False)
