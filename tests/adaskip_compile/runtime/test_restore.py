"""The way back: restore gives the uncompiled model, and lets go of all that compiling it made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.capture.package import why_not
from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_compile.runtime.session import sessions_of
from tests.doors import compiled_by
from tests.generation import generate, greedy_loop, make_cache
from tests.models import plain, tiny, tokens
from tests.reference import omit_sublayers

SCALES = {"model.layers.1.self_attn": 0.9, "model.layers.0.mlp": 0.8}
DOORS = ("compile", "model.compile", "torch.compile")
IDS = tokens(1, 9)


@pytest.fixture
def llama():
    return tiny("llama")


def compiled_here(door: str, model: Any, **options: Any) -> Any:
    return compiled_by(door, model, SkipPlan.from_scales(SCALES), **{"inner": "eager", **options})


def answer(call: Callable[..., Any], model: nn.Module) -> list[int]:
    return greedy_loop(call, IDS, torch.ones_like(IDS), 4, cache=make_cache("dynamic", model))[0].tolist()


def logits(call: Callable[..., Any]) -> torch.Tensor:
    with torch.no_grad():
        return call(IDS).logits


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kept", [True, False])
def test_the_model_is_as_it_was_and_the_session_is_gone(llama, door: str, kept: bool):
    eager = generate(llama, IDS, torch.ones_like(IDS), 4)
    with omit_sublayers(llama, SCALES):
        skipping = logits(llama)
    full = logits(llama)
    call = compiled_here(door, llama, keep_captures=kept)
    answer(call, llama)
    torch.testing.assert_close(logits(call), skipping)
    [session] = sessions_of(llama)
    gone = [weakref.ref(one) for one in (session, *session.graphs)]
    assert len(gone) > 1
    del session
    assert adaskip_compile.restore(call) is llama
    assert llama._compiled_call_impl is None
    for _ in range(3):
        gc.collect()  # what a finaliser lets go of goes in the next round
    assert [one() for one in gone] == [None] * len(gone)
    assert torch.equal(logits(llama), full)
    assert torch.equal(generate(llama, IDS, torch.ones_like(IDS), 4), eager)
    assert adaskip_compile.restore(llama) is llama
    assert "nothing ran through adaskip on this model" in str(adaskip_compile.report(llama))


@pytest.mark.skipif(why_not() is not None, reason=f"captures are not kept: {why_not()}")
def test_what_was_taken_up_from_kept_captures_is_gone_too(llama, cache_dir: Path):
    answer(compiled_here("compile", tiny("llama", seed=1)), llama)
    for _ in range(2):
        answer(compiled_here("compile", llama), llama)
        [session] = sessions_of(llama)
        assert all(graph.restored for graph in session.graphs)
        gone = [weakref.ref(one) for one in (session, *session.graphs)]
        assert len(gone) == 3
        del session
        adaskip_compile.restore(llama)
        for _ in range(3):
            gc.collect()
        assert [one() for one in gone] == [None] * 3


@pytest.mark.parametrize("door", DOORS)
def test_it_is_compiled_again(llama, door: str):
    with omit_sublayers(llama, SCALES):
        skipping, chosen = logits(llama), answer(llama, llama)
    for _ in range(2):
        call = compiled_here(door, llama)
        torch.testing.assert_close(logits(call), skipping)
        assert answer(call, llama) == chosen
        assert len(adaskip_compile.report(llama).requests) == 2
        adaskip_compile.restore(call)
    other = {"model.layers.0.self_attn": 1.1}
    with omit_sublayers(llama, other):
        wanted = logits(llama)
    torch.testing.assert_close(
        logits(adaskip_compile.compile(llama, SkipPlan.from_scales(other), inner="eager")), wanted
    )


def test_other_models_of_the_class_capture_nothing_anew(llama):
    other = compiled_here("model.compile", tiny("llama", seed=1))
    wanted = logits(other)
    logits(compiled_here("model.compile", llama))
    adaskip_compile.restore(llama)
    assert torch.equal(logits(other), wanted)
    [session] = adaskip_compile.report(other).sessions
    assert [graph.calls for graph in session.graphs] == [2]


def test_graphs_that_ran_unskipped_are_let_go(llama):
    wanted = logits(llama)
    compiled_here("model.compile", llama)
    llama(IDS)  # needs gradients
    [session] = sessions_of(llama)
    assert session.unskipped
    session = weakref.ref(session)
    adaskip_compile.restore(llama)
    gc.collect()
    assert session() is None
    assert torch.equal(logits(llama), wanted)


def test_a_model_that_was_never_compiled_is_returned():
    model = plain()
    assert adaskip_compile.restore(model) is model


def test_the_caches_of_requests_are_not_held(llama):
    call = compiled_here("compile", llama)
    cache = make_cache("dynamic", llama)
    with torch.no_grad():
        call(IDS, **cache_argument(llama, cache))
    held = weakref.ref(cache.layers[0].keys.untyped_storage())
    del cache
    adaskip_compile.restore(llama)
    gc.collect()
    assert held() is None
