from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import adaskip_compile
from adaskip_compile.evaluation import likelihood
from adaskip_compile.evaluation.likelihood import decoded_nlls, mean_nll, window_nlls
from tests.models import tiny, tokens


def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of every token but the first, by one eager forward."""
    return functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").detach()


@pytest.mark.parametrize("chunk", [3, 256])
def test_mean_nll_is_cross_entropy_over_all_tokens(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likelihood, "_LOSS_CHUNK", chunk)
    model = tiny("llama")
    samples = [tokens(length=11, seed=1)[0], tokens(length=6, seed=2)[0]]
    expected = float(torch.cat([losses(model, ids) for ids in samples]).mean())
    assert mean_nll(model, samples) == pytest.approx(expected, rel=1e-5)


def test_windows_of_one_length_share_a_forward_and_keep_their_order():
    model = tiny("llama")
    samples = [
        tokens(length=length, seed=length + seed)[0] for length, seed in ((9, 0), (9, 1), (9, 2), (6, 0), (9, 3))
    ]
    expected = [float(losses(model, ids).mean()) for ids in samples]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = window_nlls(model, samples, batch=2)
    assert rows == [2, 1, 1, 1]
    assert found == pytest.approx(expected, rel=1e-5)


def test_decoded_tokens_are_the_last_ones_each_in_a_step_of_its_own():
    model, ids = tiny("llama"), tokens(length=20)[0]
    expected = float(losses(model, ids)[-7:].mean())
    steps: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: steps.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert decoded_nlls(model, [ids], decoded=7) == pytest.approx([expected], rel=1e-4)
    assert steps == [12, *[1] * 7]


def test_a_plan_is_measured_as_its_user_gets_it():
    model, ids = tiny("llama"), tokens(length=20)[0]
    full = window_nlls(model, [ids])
    plan = adaskip_compile.SkipPlan.from_scales({"model.layers.1.self_attn": 0.5})
    adaskip_compile.compile(model, plan, inner="eager")
    skipped, decoded = window_nlls(model, [ids]), decoded_nlls(model, [ids], decoded=18)
    assert abs(skipped[0] - full[0]) > 1e-3
    [first, *_] = (request for request in adaskip_compile.report(model).requests)
    assert first.skipped == plan.scales
    last = adaskip_compile.report(model).requests[-1]
    assert last.tokens["steady"] == 18
    assert decoded != skipped
