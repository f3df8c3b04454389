"""One result with every supported version: logits kept from the pinned ones, by all three doors.

``python -m tests.adaskip_compile.test_versions`` writes them anew, with the pinned versions alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_passes.errors import ForeignFileError
from tests.models import tiny, tokens
from tests.reference import omit_sublayers

KEPT = Path(__file__).parents[1] / "golden" / "version_logits.json"
DOORS = ("adaskip_compile.compile", "model.compile", "torch.compile")
SCALES = {"model.layers.0.self_attn": 0.9, "model.layers.2.mlp": 1.1}
SMOLLM2 = {"model.layers.20.self_attn": 1.02, "model.layers.11.mlp": 1.05}


def through(door: str, model: Any, scales: dict[str, float], ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of ``ids`` from ``model`` compiled by ``door``, having looked at what its report says."""
    plan = SkipPlan.from_scales(scales)
    options: dict[str, Any] = {"plan": plan, "inner": "eager"}
    call = model
    if door == "adaskip_compile.compile":
        adaskip_compile.compile(model, plan, inner="eager")
    elif door == "model.compile":
        model.compile(backend="adaskip", options=options)
    else:
        call = torch.compile(model, backend="adaskip", options=options)
    with torch.no_grad():
        logits = call(ids).logits
    model._compiled_call_impl = None
    request = adaskip_compile.report(model).requests[-1]
    assert request.skipped == scales
    assert request.tokens["prefill"] == ids.shape[1]
    return logits


def sample(logits: torch.Tensor) -> list[float]:
    """Return a few logits of the first and the last token."""
    return [round(value, 5) for value in logits[0, [0, -1]][:, [3, 17, 42, 99]].flatten().tolist()]


def llama_ids() -> torch.Tensor:
    return tokens(1, 9)


def smollm2_ids(tokenizer: Any) -> torch.Tensor:
    return torch.tensor([tokenizer("The capital of France is the city of")["input_ids"]])


@pytest.mark.parametrize("door", DOORS)
def test_a_tiny_model_has_the_logits_of_the_pinned_versions(door):
    logits = through(door, tiny("llama", num_hidden_layers=3), SCALES, llama_ids())
    assert sample(logits) == pytest.approx(json.loads(KEPT.read_text())["llama"], abs=2e-4)


@pytest.mark.slow
def test_a_real_model_has_the_logits_of_the_pinned_versions(smollm2):
    model, tokenizer = smollm2
    kept = json.loads(KEPT.read_text())["smollm2"]
    for door in DOORS:
        torch._dynamo.reset()
        assert sample(through(door, model, SMOLLM2, smollm2_ids(tokenizer))) == pytest.approx(kept, abs=2e-3)


@pytest.mark.parametrize("door", DOORS)
def test_a_foreign_plan_is_refused_by_every_door(door, tmp_path):
    other, model = (tiny("llama", num_hidden_layers=3, seed=seed) for seed in (1, 0))
    file = tmp_path / "plan.json"
    adaskip_compile.plan(adaskip_compile.profile(other, [llama_ids()]), skip=2).save(file)
    options: dict[str, Any] = {"plan": str(file), "inner": "eager"}
    if door == "adaskip_compile.compile":
        with pytest.raises(ForeignFileError, match="was made for another"):
            adaskip_compile.compile(model, file, inner="eager")
        return
    call = torch.compile(model, backend="adaskip", options=options) if door == "torch.compile" else model
    if door == "model.compile":
        model.compile(backend="adaskip", options=options)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="was made for another"):
        call(llama_ids())


def _write() -> None:
    from adaskip_compile.checkpoints import load_checkpoint

    with torch.no_grad():
        model = tiny("llama", num_hidden_layers=3)
        with omit_sublayers(model, SCALES):
            llama = sample(model(llama_ids()).logits)
        model, tokenizer = load_checkpoint("smollm2")
        with omit_sublayers(model, SMOLLM2):
            smollm2 = sample(model(smollm2_ids(tokenizer)).logits)
    KEPT.write_text(json.dumps({"llama": llama, "smollm2": smollm2}, indent=1) + "\n")


if __name__ == "__main__":
    _write()
