"""Models that are compiled in one thread and run in others, at once: no error, no other tokens, no session made twice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo import config

import adaskip_compile
import adaskip_compile.backend
from adaskip_compile import SkipPlan
from adaskip_compile.options import Options
from adaskip_compile.runtime import session as sessions
from tests.doors import compiled_by
from tests.generation import greedy_loop, make_cache
from tests.models import tiny, tokens
from tests.reference import omit_sublayers

DOORS = ("compile", "model.compile", "torch.compile")
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def scales_of(number: int) -> dict[str, float]:
    """Return what model ``number`` skips: every third one an attention, each with a scale of its own."""
    attention = {"model.layers.0.self_attn": 0.8} if number % 3 == 0 else {}
    return {"model.layers.0.mlp": 0.9 + 0.01 * number, **attention}


def answer(call: Callable[..., Any], model: nn.Module, number: int) -> list[int]:
    ids = tokens(1, 7 + number)
    return greedy_loop(call, ids, torch.ones_like(ids), 4, cache=make_cache("dynamic", model))[0].tolist()


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run ``work(thread)`` in so many new threads that start together; whatever one raises is raised here."""
    barrier = threading.Barrier(max(count, 1))

    def started(thread: int) -> None:
        barrier.wait(60)
        work(thread)

    with ThreadPoolExecutor(max(count, 1)) as pool:
        for found in [pool.submit(started, thread) for thread in range(count)]:
            found.result()


def check_threads(
    door: str, *, models: int, threads: int, first: int = 0, sizes: dict[str, int] = SMALL, **options: Any
) -> None:
    """Compile here, call all models in ``first`` threads, and then in ``threads`` at once, in another order each."""
    made = [tiny("llama", seed=number, **sizes) for number in range(models)]
    wanted = []
    for number, model in enumerate(made):
        with omit_sublayers(model, scales_of(number)):
            wanted.append(answer(model, model, number))
    plans = [SkipPlan.from_scales(scales_of(number)) for number in range(models)]
    calls = [compiled_by(door, model, plan, **options) for model, plan in zip(made, plans, strict=True)]

    def work(thread: int) -> None:
        for step in range(models):
            number = (5 * step + thread) % models
            assert answer(calls[number], made[number], number) == wanted[number], (thread, number)

    for count in (first, threads):
        in_threads(count, work)
    for number, model in enumerate(made):
        [session] = adaskip_compile.report(model).sessions
        assert not session.unskipped_graphs
        assert len(session.requests) == first + threads
        assert all(set(request.skipped) == set(scales_of(number)) for request in session.requests)


@pytest.mark.newest("before, Dynamo has one configuration for all threads, and to capture in two at once can crash it")
@pytest.mark.parametrize(("door", "models"), [("compile", 12), ("model.compile", 9), ("torch.compile", 9)])
def test_eight_threads_use_the_models_that_another_one_compiled(door: str, models: int):
    check_threads(door, models=models, first=1, threads=8, inner="eager")


@pytest.mark.newest("before, Dynamo has one configuration for all threads, and to capture in two at once can crash it")
@pytest.mark.parametrize(("door", "inner"), [("model.compile", "eager"), ("compile", "inductor")])
def test_threads_capture_and_compile_at_once(door: str, inner: str):
    check_threads(door, models=2, threads=3, sizes={}, inner=inner)


@pytest.mark.newest("before, Dynamo has one configuration for all threads, and to capture in two at once can crash it")
@pytest.mark.parametrize("door", DOORS)
def test_there_is_room_for_many_graphs_of_one_model_in_a_new_thread(door: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("recompile_limit", "accumulated_recompile_limit"):  # as in a process that has compiled nothing
        entry = config._config[name]  # type: ignore[attr-defined]
        monkeypatch.setattr(entry, "default", 8 if name == "recompile_limit" else 256)
    model, scales = tiny("llama", **SMALL), scales_of(0)
    ways = [
        {"output_hidden_states": states, "use_cache": cache, "logits_to_keep": keep, "attention_mask": mask}
        for states in (False, True)
        for cache in (False, True)
        for keep in (0, 1)
        for mask in (None, torch.ones(1, 9, dtype=torch.long))
    ][:12]
    with torch.no_grad(), omit_sublayers(model, scales):
        wanted = [model(tokens(1, 9), **how).logits for how in ways]
    call = compiled_by(door, model, SkipPlan.from_scales(scales), inner="eager")

    @torch.no_grad()
    def work(_: int) -> None:
        for how, logits in zip(ways[-2:], wanted[-2:], strict=True):
            torch.testing.assert_close(call(tokens(1, 9), **how).logits, logits)

    with torch.no_grad():
        for how, logits in zip(ways[:-2], wanted[:-2], strict=True):
            torch.testing.assert_close(call(tokens(1, 9), **how).logits, logits)
    captured = len(adaskip_compile.report(model).sessions[0].graphs)
    assert captured > 8
    in_threads(1, work)
    assert len(adaskip_compile.report(model).sessions[0].graphs) == captured + 2


def test_two_threads_make_one_session(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama", **SMALL)
    began = threading.Event()
    init = sessions.Session.__init__

    def slow(self: sessions.Session, *args: Any) -> None:
        second = began.is_set()
        began.set()
        if not second:
            threading.Event().wait(0.3)
        init(self, *args)

    monkeypatch.setattr(sessions.Session, "__init__", slow)
    found: list[sessions.Session] = []
    in_threads(4, lambda _: found.append(sessions.session_for(model, Options(plan=SkipPlan.none()))))
    assert len(found) == 4
    assert len({*map(id, found)}) == 1
    assert sessions.sessions_of(model) == (found[0],)


def test_two_threads_compile_a_model_once(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama", **SMALL)
    made: list[Any] = []
    forward = adaskip_compile.backend._compiled_forward

    def slow(*args: Any) -> Callable[..., Any]:
        made.append(args)
        threading.Event().wait(0.2)
        return forward(*args)

    monkeypatch.setattr(adaskip_compile.backend, "_compiled_forward", slow)
    in_threads(3, lambda _: adaskip_compile.compile(model, SkipPlan.none(), inner="eager"))
    assert len(made) == 1


def test_a_call_goes_on_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch):
    warm = tiny("llama", **SMALL)
    adaskip_compile.compile(warm, SkipPlan.from_scales(scales_of(0)), inner="eager")
    with torch.no_grad():
        wanted = warm(tokens(1, 9)).logits
    compile_ = torch._inductor.standalone_compile
    called: list[torch.Tensor] = []

    @torch.no_grad()
    def call(_: int) -> None:
        called.append(warm(tokens(1, 9)).logits)

    def traced(*args: Any, **how: Any) -> Any:
        if not called:
            # Newer versions of torch keep the flag by thread, and no other one sees it.
            with mock.patch.object(torch.fx._symbolic_trace, "_is_fx_tracing_flag", True, create=True):
                in_threads(1, call)
        return compile_(*args, **how)

    monkeypatch.setattr(torch._inductor, "standalone_compile", traced)
    other = adaskip_compile.compile(tiny("llama", seed=1), SkipPlan.none(), inner="inductor")
    with torch.no_grad():
        other(tokens(1, 9))
    assert [torch.equal(logits, wanted) for logits in called] == [True]
