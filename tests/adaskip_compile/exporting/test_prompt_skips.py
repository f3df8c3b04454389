"""Exported programs that skip for the body of a prompt: against layers written by hand, and against the driver."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import OptionError, PlanError, RampStep, SkipPlan
from adaskip_compile.exporting.runner import ExportedModel
from tests.adaskip_compile.exporting.exports import generate_alone
from tests.adaskip_compile.planning.test_prompt_skips import (
    BODY,
    FAMILIES,
    HEAD,
    SCALES,
    TAIL,
    a_map,
    body_plan,
    model_of,
)
from tests.generation import generate
from tests.models import tokens
from tests.reference import replace_body

LEAST = 4 * (HEAD + TAIL)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ExportedModel]:
    model, folder = model_of(request.param), tmp_path_factory.mktemp("exports") / request.param
    adaskip_compile.export(model, body_plan(), folder, max_length=96)
    return model, ExportedModel(folder)


@torch.no_grad()
def last_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[:, -1:]


@pytest.mark.parametrize("length", [LEAST, 41, 90])
def test_a_prompt_skips(exported: tuple[Any, ExportedModel], length: int) -> None:
    model, programs = exported
    ids = tokens(1, length, seed=length)
    with replace_body(model, BODY):
        wanted = last_logits(model, ids)
    got = programs.prefill(ids, torch.arange(length))
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    assert (got - last_logits(model, ids)).abs().max() > 2e-3


def test_what_comes_after_it_runs_in_full(exported: tuple[Any, ExportedModel]) -> None:
    model, programs = exported
    ids, mask = tokens(1, 40), torch.ones(1, 40, dtype=torch.long)
    with replace_body(model, BODY):
        wanted = generate(model, ids, mask, 24)
    assert not torch.equal(wanted, generate(model, ids, mask, 24))
    assert torch.equal(programs.generate(ids, 24), wanted)


@pytest.mark.parametrize("length", [1, 2, LEAST - 1])
def test_a_prompt_without_a_body_runs_in_full(exported: tuple[Any, ExportedModel], length: int) -> None:
    model, programs = exported
    ids = tokens(1, length, seed=length)
    wanted = generate(model, ids, torch.ones_like(ids), 8)
    assert torch.equal(programs.generate(ids, 8), wanted)


def test_the_manifest_tells_of_body_and_edges(exported: tuple[Any, ExportedModel]) -> None:
    _, programs = exported
    prefill, decode = (programs.manifest["programs"][name] for name in ("prefill", "decode"))
    assert prefill["tokens"] == {"from": LEAST, "to": 96}
    assert set(prefill["body_skipped"]) == set(SCALES)
    assert (prefill["plan"]["prompt"]["head"], prefill["plan"]["prompt"]["tail"]) == (HEAD, TAIL)
    assert prefill["skipped"] == {}
    assert decode["body_skipped"] == []
    assert any("narrow-rows" in line for line in prefill["passes"])
    assert prefill["notes"] == []


def test_with_pytorch_alone_and_beside_holes(tmp_path: Path) -> None:
    """The driver is the reference here; it has references of its own."""
    model, ids = model_of("llama"), tokens(1, 40)
    holes = SkipPlan.from_scales({"model.layers.1.self_attn": 0.9})
    plan = replace(body_plan(), skipped=holes.skipped)
    graphs = adaskip_compile.export(model, plan, tmp_path / "out", max_length=96)
    assert "skips 1 sublayers and 5 for the body of a prompt" in str(graphs)
    adaskip_compile.compile(model, plan, inner="eager")
    wanted = generate(model, ids, torch.ones_like(ids), 24)
    assert torch.equal(generate_alone(graphs, ids, 24), wanted)


def test_decode_has_maps_of_its_own(tmp_path: Path) -> None:
    """Both programs name their maps by sublayer, and share one copy of their weights."""
    model, ids, path = model_of("llama"), tokens(1, 40), "model.layers.2.mlp"
    later = replace(SkipPlan.from_scales({path: 1.0}), maps={path: a_map(5)})
    adaskip_compile.export(model, body_plan(), tmp_path / "out", decode_plan=later, max_length=96)
    adaskip_compile.compile(model, body_plan(ramp=(RampStep(0, later.skipped),), maps=later.maps), inner="eager")
    wanted = generate(model, ids, torch.ones_like(ids), 24)
    assert torch.equal(ExportedModel(tmp_path / "out").generate(ids, 24), wanted)


def test_less_is_computed_of_the_body(tmp_path: Path) -> None:
    model = model_of("llama")
    full, skipping = (
        adaskip_compile.export(model, plan, tmp_path / name, max_length=96)
        for name, plan in (("full", None), ("skipping", body_plan()))
    )
    # Of a prompt only the last token's logits are read, so the last layer runs for that one alone, at no loss.
    assert any("narrow-rows" in line for line in full.manifest["programs"]["prefill"]["passes"])
    ids = tokens(1, 40)
    wanted = last_logits(model, ids)
    got = ExportedModel(full.directory).prefill(ids, torch.arange(40))
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    counted = [
        _multiplied(torch.export.load(graphs.directory / "prefill.pt2"), tokens(1, 90)) for graphs in (full, skipping)
    ]
    assert counted[1] < 0.75 * counted[0]


def _multiplied(program: torch.export.ExportedProgram, ids: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        program.module()(ids, torch.arange(ids.shape[1]))
    return counter.get_total_flops()


def test_rows_of_a_batch(tmp_path: Path) -> None:
    model, ids = model_of("llama"), torch.cat([tokens(1, 40, seed=1), tokens(1, 40, seed=2)])
    adaskip_compile.export(model, body_plan(), tmp_path / "out", batch=2, max_length=64)
    with replace_body(model, BODY):
        wanted = generate(model, ids, torch.ones_like(ids), 20)
    assert torch.equal(ExportedModel(tmp_path / "out").generate(ids, 20), wanted)


def test_too_little_room_for_a_prompt_with_a_body(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{LEAST} and more"):
        adaskip_compile.export(model_of("llama"), body_plan(), tmp_path / "out", max_length=LEAST)


def test_decode_has_no_body(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="decode_plan skips for the body of a prompt, which decode never has"):
        adaskip_compile.export(model_of("llama"), None, tmp_path / "out", decode_plan=body_plan())


def test_windows_stay_behind_and_the_manifest_says_so(tmp_path: Path) -> None:
    model, ids = model_of("llama"), tokens(1, 40)
    plan = body_plan()
    assert plan.prompt is not None
    plan = replace(plan, prompt=replace(plan.prompt, windows={"model.layers.0.self_attn": 3}))
    programs = ExportedModel(adaskip_compile.export(model, plan, tmp_path / "out", max_length=96).directory)
    with replace_body(model, BODY):
        wanted = last_logits(model, ids)
    torch.testing.assert_close(programs.prefill(ids, torch.arange(40)), wanted, rtol=2e-5, atol=2e-5)
    [note] = programs.manifest["programs"]["prefill"]["notes"]
    assert note == "windows of attention are left out (1 in the plan): the whole prompt is seen here"
