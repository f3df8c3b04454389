"""The window of a request: which FFNs it adds and with what scale, against hooks on the eager model."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from tests.generation import make_cache
from tests.models import tiny, tokens
from tests.reference import hook_statistics, omit_sublayers, run_request

pytestmark = pytest.mark.shares_captures

PREFILL_SET = {"model.layers.1.self_attn": 0.97, "model.layers.3.mlp": 1.04, "model.layers.4.self_attn": 1.02}
WINDOW, STEPS = 4, 12
BATCH = 2
COLUMNS = {"similarity": "similarity", "token": "scale_token", "frobenius": "scale_frobenius"}


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Keep captures for a whole module: all plans share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", num_hidden_layers=6)


@pytest.fixture(scope="module")
def measured(llama):
    """Mean similarity and scales of each kept FFN over the window, by hooks on the eager model."""
    llama._compiled_call_impl = None
    with omit_sublayers(llama, PREFILL_SET), hook_statistics(llama) as calls:
        run_request(llama, tokens(BATCH, 11), tokens(BATCH, STEPS, seed=1), cache=make_cache("dynamic", llama))
    window = calls[1 : 1 + WINDOW]
    kept = [path for path in window[0] if path.endswith("mlp")]
    assert len(kept) == 5

    def mean(path: str, name: str) -> float:
        return sum(getattr(call[path], name) for call in window) / WINDOW

    return {path: {name: mean(path, measure) for name, measure in COLUMNS.items()} for path in kept}


@pytest.fixture(scope="module")
def beta(measured):
    """A threshold that two of the five kept FFNs reach, well between the second and the third."""
    ranked = sorted((row["similarity"] for row in measured.values()), reverse=True)
    assert ranked[1] - ranked[2] > 1e-3
    return (ranked[1] + ranked[2]) / 2


def plan(beta: float | None, window: int = WINDOW, scale: str = "token") -> SkipPlan:
    return replace(SkipPlan.from_scales(PREFILL_SET, window=window), beta=beta, scale_kind=scale)


def request(llama, plan: SkipPlan, kind: str = "dynamic") -> list[torch.Tensor]:
    adaskip_compile.compile(llama, plan, inner="eager")
    return run_request(llama, tokens(BATCH, 11), tokens(BATCH, STEPS, seed=1), cache=make_cache(kind, llama))


@contextmanager
def grown_set(llama, extra: dict[str, float], window: int):
    """Omit the prefill set, and from the call after the window on ``extra`` as well."""
    scales, calls = dict(PREFILL_SET), itertools.count()

    def grow(*_) -> None:
        if next(calls) == 1 + window:
            scales.update(extra)

    llama._compiled_call_impl = None
    hook = llama.register_forward_pre_hook(grow)
    try:
        with omit_sublayers(llama, scales):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("scale", ["token", "frobenius"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_extra_ffns_are_those_that_hooks_measure(llama, measured, beta, kind, scale):
    logits = request(llama, plan(beta, scale=scale), kind)
    last = adaskip_compile.report(llama).requests[-1]
    wanted = {path: row[scale] for path, row in measured.items() if row["similarity"] >= beta}
    assert len(wanted) == 2
    assert last.extra.keys() == wanted.keys()
    assert last.extra == pytest.approx(wanted, abs=1e-4)
    assert last.skipped == PREFILL_SET
    assert last.tokens == {"prefill": 11, "window": WINDOW, "steady": STEPS - WINDOW}

    with grown_set(llama, wanted, WINDOW):
        reference = run_request(llama, tokens(BATCH, 11), tokens(BATCH, STEPS, seed=1), cache=make_cache(kind, llama))
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)
    with omit_sublayers(llama, PREFILL_SET):
        fewer = run_request(llama, tokens(BATCH, 11), tokens(BATCH, STEPS, seed=1), cache=make_cache(kind, llama))
    differs = [bool((one - other).abs().max() > 1e-2) for one, other in zip(logits, fewer, strict=True)]
    assert differs == [False] * (1 + WINDOW) + [True] * (STEPS - WINDOW)


def test_the_two_scales_differ(measured):
    assert any(abs(row["token"] - row["frobenius"]) > 1e-3 for row in measured.values())


@pytest.mark.parametrize(("share", "count"), [(-2.0, 5), (2.0, 0)], ids=["all", "none"])
def test_a_threshold_may_take_all_or_none(llama, share, count):
    request(llama, plan(share))
    assert len(adaskip_compile.report(llama).requests[-1].extra) == count


@pytest.mark.parametrize("off", [plan(-2.0, window=0), plan(None)], ids=["no-window", "no-threshold"])
def test_without_a_window_nothing_is_probed_or_added(llama, off):
    model = tiny("llama", num_hidden_layers=6)  # no variants of other plans
    logits = request(model, off)
    report = adaskip_compile.report(model)
    assert report.requests[-1].extra == {}
    assert report.requests[-1].tokens["window"] == 0
    assert {variant.probed for graph in report.sessions[-1].graphs for variant in graph.variants} == {0}
    with grown_set(model, {}, 0):
        reference = run_request(
            model, tokens(BATCH, 11), tokens(BATCH, STEPS, seed=1), cache=make_cache("dynamic", model)
        )
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)


def test_only_kept_ffns_are_probed_and_only_in_the_window(llama, beta):
    request(llama, plan(beta))
    graphs = adaskip_compile.report(llama).sessions[-1].graphs
    probed = {(graph.phase, variant.skipped, variant.probed) for graph in graphs for variant in graph.variants}
    assert ("decode", 3, 5) in probed
    assert {count for phase, _, count in probed if phase == "prefill"} == {0}
    assert ("decode", 5, 0) in probed


def test_a_request_that_ends_in_its_window_adds_nothing(llama, beta):
    adaskip_compile.compile(llama, plan(beta), inner="eager")
    run_request(llama, tokens(1, 9), tokens(1, WINDOW - 1), cache=make_cache("dynamic", llama))
    last = adaskip_compile.report(llama).requests[-1]
    assert last.extra == {}
    assert last.tokens["window"] == WINDOW - 1


def test_each_request_has_a_window_of_its_own(llama, beta):
    request(llama, plan(beta))
    run_request(llama, tokens(1, 9, seed=5), tokens(1, WINDOW + 2, seed=6), cache=make_cache("dynamic", llama))
    first, second = adaskip_compile.report(llama).requests[-2:]
    assert second.number == first.number + 1
    assert second.tokens["window"] == WINDOW
    assert first.extra != second.extra
