"""Plans that change while a request is decoded: legality, and the results against an eager model that omits the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import LegalityError, PlanError, SkipPlan
from adaskip_compile.planning.skip_plan import PLAN_FORMAT, RampStep
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.runtime.session import sessions_of
from tests.generation import CACHES, generate, make_cache
from tests.models import tiny, tokens
from tests.reference import omit_sublayers, run_request

LAYERS, STEPS = 6, 9
PREFILL = {"model.layers.1.self_attn": 0.97, "model.layers.3.mlp": 1.04}
# From the decoded token 0, 2 and 5 on: an FFN and layer 0's attention, which counts the positions; two attentions, while
# the FFN of the prefill set runs again; and that FFN once more.
FIRST = {"model.layers.0.self_attn": 0.95, "model.layers.2.mlp": 1.02}
SECOND = {"model.layers.4.self_attn": 1.03, "model.layers.5.self_attn": 0.9}
THIRD = {"model.layers.3.mlp": 1.1}


def skipped(scales: dict[str, float]) -> tuple[SkippedSublayer, ...]:
    return tuple(SkippedSublayer(path, "", None, scale, None) for path, scale in scales.items())


STEP_0 = RampStep(0, skipped(FIRST))
STEP_2 = RampStep(2, skipped(SECOND), ("model.layers.3.mlp",))
STEP_5 = RampStep(5, skipped(THIRD))
PLAN = replace(SkipPlan.from_scales(PREFILL), ramp=(STEP_0, STEP_2, STEP_5))


def scales_at(decoded: int) -> dict[str, float]:
    """Return by hand what is skipped when the decoded token of that number is computed; -1 is prefill."""
    now = dict(PREFILL)
    if decoded >= 0:
        now |= FIRST
    if decoded >= 2:
        now = {path: scale for path, scale in now.items() if path != "model.layers.3.mlp"} | SECOND
    if decoded >= 5:
        now |= THIRD
    return now


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Keep captures for a whole module: all plans share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", num_hidden_layers=LAYERS)


@contextmanager
def ramped(model: Any) -> Iterator[None]:
    """Make the eager model omit, call by call, what :func:`scales_at` says."""
    scales, calls = dict(PREFILL), itertools.count(-1)

    def change(*_: object) -> None:
        now = scales_at(next(calls))
        scales.clear()
        scales.update(now)

    model._compiled_call_impl = None
    hook = model.register_forward_pre_hook(change)
    try:
        # All that is ever skipped, so that it is known to be there; the hook has the last word.
        with omit_sublayers(model, scales):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", CACHES)
def test_each_token_skips_what_the_ramp_says(llama: Any, kind: str) -> None:
    prompt, forced = tokens(2, 11), tokens(2, STEPS, seed=1)
    with ramped(llama):
        wanted = run_request(llama, prompt, forced, cache=make_cache(kind, llama))
    adaskip_compile.compile(llama, PLAN, inner="eager")
    got = run_request(llama, prompt, forced, cache=make_cache(kind, llama))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with omit_sublayers(llama, PREFILL):
        llama._compiled_call_impl = None
        without = run_request(llama, prompt, forced, cache=make_cache(kind, llama))
    torch.testing.assert_close(wanted[0], without[0])
    assert (wanted[1] - without[1]).abs().max() > 1e-3, "the ramp makes a difference from its first token on"


def test_generate_goes_through_it(llama: Any) -> None:
    ids = tokens(1, 11)
    with ramped(llama):
        wanted = generate(llama, ids, torch.ones_like(ids), STEPS)
    adaskip_compile.compile(llama, PLAN, inner="eager")
    assert generate(llama, ids, torch.ones_like(ids), STEPS).tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", CACHES)
def test_dropped_attentions_give_their_memory_back(llama: Any, kind: str) -> None:
    adaskip_compile.compile(llama, PLAN, inner="eager")
    held = {}
    for steps in (1, 3):
        cache = make_cache(kind, llama)
        run_request(llama, tokens(1, 11), tokens(1, steps, seed=1), cache=cache)
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        held[steps] = len({tensor.untyped_storage().data_ptr() for tensor in tensors})
        memory = sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
        assert adaskip_compile.report(llama).requests[-1].kv_bytes == memory
    assert held == {1: 2 * 4, 3: 2 * 2}


def test_the_report_tells_the_ramp(llama: Any) -> None:
    adaskip_compile.compile(llama, PLAN, inner="eager")
    run_request(llama, tokens(1, 11), tokens(1, 3, seed=1), cache=make_cache("dynamic", llama))
    report = adaskip_compile.report(llama)
    request = report.requests[-1]
    assert (request.skipped, request.ramped, request.resumed) == (PREFILL, FIRST | SECOND, ("model.layers.3.mlp",))
    assert {phase.phase: {*phase.skipped} for phase in request.phases} == {
        "prefill": {*PREFILL},
        "steady": {*scales_at(2)},
    }
    assert "since decoding: 4 more skipped, 1 run again" in str(report)


def test_the_window_measures_what_stays_in_it(llama: Any) -> None:
    """A step within the window changes what is probed; FFNs that were there all along are decided on."""
    plan = replace(PLAN, beta=-1.0, window=4)
    adaskip_compile.compile(llama, plan, inner="eager")
    run_request(llama, tokens(1, 11), tokens(1, STEPS, seed=1), cache=make_cache("dynamic", llama))
    request = adaskip_compile.report(llama).requests[-1]
    assert {*request.extra} == {f"model.layers.{layer}.mlp" for layer in (0, 1, 4, 5)}
    assert request.tokens == {"prefill": 11, "window": 4, "steady": STEPS - 4}


def test_a_stateful_sublayer_never_runs_again(llama: Any) -> None:
    resumes = replace(PLAN, ramp=(RampStep(1, (), ("model.layers.1.self_attn",)),))
    adaskip_compile.compile(llama, resumes, inner="eager")
    with pytest.raises(LegalityError, match=r"lets model\.layers\.1\.self_attn run again after 1 decoded tokens"):
        run_request(llama, tokens(1, 11), tokens(1, 3), cache=make_cache("dynamic", llama))
    adaskip_compile.compile(llama, PLAN, inner="eager")
    run_request(llama, tokens(1, 11), tokens(1, 2), cache=make_cache("dynamic", llama))
    request = sessions_of(llama)[0].requests.history[-1]
    request.check(frozenset({*FIRST, *PREFILL}))
    with pytest.raises(LegalityError, match=r"model\.layers\.0\.self_attn was skipped earlier in this request"):
        request.check(frozenset(PREFILL))


def known(path: str, stateful: bool) -> SkippedSublayer:
    return SkippedSublayer(path, "attention" if stateful else "ffn", stateful, 1.0, None)


@pytest.mark.parametrize(
    ("ramp", "error", "message"),
    [
        ((RampStep(3, (known("b", True),)), RampStep(3, (known("c", True),))), PlanError, "one after another"),
        ((RampStep(3, (known("a", True),)),), PlanError, "it is skipped already"),
        ((RampStep(3, (), ("b",)),), PlanError, "and it was not skipped"),
        ((RampStep(3, (), ("a",)),), LegalityError, "only stateless sublayers can run again"),
        ((RampStep(3, (known("b", True), known("b", True))),), PlanError, "names each sublayer once"),
    ],
)
def test_what_cannot_follow_is_refused(ramp: tuple[RampStep, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SkipPlan((known("a", True),), None, 0, "explicit", "token", None, ramp)


@pytest.mark.parametrize("fields", [{"after": -1}, {"after": 1.5}, {"after": 0, "skipped": ()}])
def test_a_senseless_step(fields: dict[str, Any]) -> None:
    options: dict[str, Any] = {"skipped": (known("a", False),), **fields}
    with pytest.raises(PlanError, match=r"a ramp step begins after|changes nothing"):
        RampStep(**options)


def test_files(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert SkipPlan.load(tmp_path / "plan.json") == PLAN


def test_a_plan_of_the_first_version_loads(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = SkipPlan.from_scales(PREFILL)
    replace(PLAN_FORMAT, version=1).write(
        path,
        {
            "skipped": [vars(one) for one in plan.skipped],
            "beta": None,
            "window": 0,
            "policy": "explicit",
            "scale_kind": "token",
            "model": None,
        },
    )
    assert json.loads(path.read_text())["version"] == 1
    assert SkipPlan.load(path) == plan


def test_table() -> None:
    assert PLAN.describe().splitlines() == [
        "skips 2 sublayers; no FFN is added online; scale: token, policy: explicit",
        "sublayer                  kind       similarity   scale",
        "model.layers.1.self_attn  -                   -  0.9700",
        "model.layers.3.mlp        -                   -  1.0400",
        "from decoded token 0 on skips 2 more",
        "sublayer                  kind       similarity   scale",
        "model.layers.0.self_attn  -                   -  0.9500",
        "model.layers.2.mlp        -                   -  1.0200",
        "from decoded token 2 on skips 2 more; runs again model.layers.3.mlp",
        "sublayer                  kind       similarity   scale",
        "model.layers.4.self_attn  -                   -  1.0300",
        "model.layers.5.self_attn  -                   -  0.9000",
        "from decoded token 5 on skips 1 more",
        "sublayer                  kind       similarity   scale",
        "model.layers.3.mlp        -                   -  1.1000",
    ]
    assert [PLAN.paths_at(decoded) for decoded in (0, 1, 2, 5)] == [frozenset(scales_at(at)) for at in (0, 1, 2, 5)]
