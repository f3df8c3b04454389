"""What a model computes beside its weights is part of what a capture is right for: a changed forward or hook is seen."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaMLP

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.capture.dynamo import capture_count
from adaskip_compile.capture.module_code import CodeState, ModelCode
from adaskip_compile.capture.package import why_not
from tests.models import tiny, tokens

kept = pytest.mark.skipif(why_not() is not None, reason=f"captures are not kept: {why_not()}")
Change = Callable[[Any], Any]


def scaled(factor: float) -> Callable[..., Any]:
    return lambda _, __, output: factor * output


def other_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


@contextmanager
def forward_hook(model: Any) -> Iterator[None]:
    with model.model.layers[0].mlp.register_forward_hook(scaled(1.5)):
        yield


@contextmanager
def pre_hook_with_keywords(model: Any) -> Iterator[None]:
    def double(_: Any, args: Any, kwargs: Any) -> Any:
        return (2 * args[0], *args[1:]), kwargs

    with model.model.layers[0].mlp.register_forward_pre_hook(double, with_kwargs=True):
        yield


@contextmanager
def global_hook(_: Any) -> Iterator[None]:
    with register_module_forward_hook(lambda one, _, out: 1.5 * out if isinstance(one, LlamaMLP) else None):
        yield


@contextmanager
def patched_class(_: Any) -> Iterator[None]:
    with mock.patch.object(LlamaMLP, "forward", other_forward):
        yield


@contextmanager
def replaced_code(_: Any) -> Iterator[None]:
    original = LlamaMLP.forward.__code__
    LlamaMLP.forward.__code__ = other_forward.__code__
    try:
        yield
    finally:
        LlamaMLP.forward.__code__ = original


@contextmanager
def bound_forward(model: Any) -> Iterator[None]:
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(other_forward, mlp)
    try:
        yield
    finally:
        del mlp.forward


@contextmanager
def partial_forward(model: Any) -> Iterator[None]:
    mlp = model.model.layers[1].mlp
    mlp.forward = functools.partial(other_forward, mlp)
    try:
        yield
    finally:
        del mlp.forward


CHANGES = [
    forward_hook,
    pre_hook_with_keywords,
    global_hook,
    patched_class,
    replaced_code,
    bound_forward,
    partial_forward,
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(1, 12, vocabulary=100)).logits


def eager_logits(model: Any) -> torch.Tensor:
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        return logits(model)
    finally:
        model._compiled_call_impl = compiled


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_another_state_and_its_end_the_first_one(change: Any):
    model = tiny("llama")
    code = ModelCode(model)
    before = code.state()
    with change(model):
        assert code.state() != before
        assert code.state() is code.state()
    assert code.state() == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "mixtral", "bloom", "mamba"])
def test_models_as_they_come_are_described_alike_whatever_their_weights(family: str):
    states = [ModelCode(tiny(family, seed=seed)).state() for seed in (1, 2)]
    assert states[0] == states[1]
    assert not states[0].why_passing


def test_a_module_that_takes_the_place_of_another_is_watched_in_its_turn():
    model = tiny("llama")
    code = ModelCode(model)
    model.model.layers[0].mlp = LlamaMLP(model.config)
    before = code.state()
    with forward_hook(model):
        assert code.state() != before


def test_hooks_that_differ_in_what_they_close_over_differ():
    states: list[CodeState] = []
    for factor in (1.5, 1.5, 2.5):
        model = tiny("llama")
        model.model.layers[0].mlp.register_forward_hook(scaled(factor))
        states.append(ModelCode(model).state())
    assert states[0] == states[1] != states[2]
    assert not states[0].why_passing


def test_a_hook_that_cannot_be_described_makes_a_state_of_this_process():
    model, factor = tiny("llama"), torch.full((), 1.5)
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: factor * output)
    code = ModelCode(model)
    assert "Tensor" in code.state().why_passing
    assert code.state() is code.state()
    assert code.state() != ModelCode(model).state()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("restored", [False, pytest.param(True, marks=kept)])
def test_a_change_after_compile_is_captured_anew(change: Any, restored: bool, cache_dir: Path):
    if restored:
        adaskip_compile.compile(first := tiny("llama", seed=1), SkipPlan.none(), inner="eager")
        logits(first)
    adaskip_compile.compile(model := tiny("llama", seed=1), SkipPlan.none(), inner="eager")
    plain = logits(model)
    assert adaskip_compile.report(model).sessions[0].graphs[0].restored == restored
    captured = capture_count()
    with change(model):
        assert not torch.allclose(eager_logits(model), plain, atol=1e-2)
        torch.testing.assert_close(logits(model), eager_logits(model))
        assert capture_count() == captured + 1
    torch.testing.assert_close(logits(model), plain)
    assert capture_count() == captured + 1


@kept
def test_a_hook_that_cannot_be_described_is_not_kept(cache_dir: Path, caplog: Any):
    caplog.set_level("INFO", "adaskip_compile.capture.store")
    model, factor = tiny("llama"), torch.full((), 1.5)
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: factor * output)
    adaskip_compile.compile(model, SkipPlan.none(), inner="eager")
    torch.testing.assert_close(logits(model), eager_logits(model))
    assert not list(cache_dir.rglob("*.capture"))
    assert "captures are not kept: nothing that lasts tells one Tensor from another" in caplog.text


PROGRAM = """
import json, sys, torch
import adaskip_compile
from adaskip_compile import SkipPlan
from tests.adaskip_compile.capture.test_module_code import eager_logits, logits, CHANGES
from tests.models import tiny

torch.set_num_threads(1)
found = {}
for change in [None, *CHANGES] if sys.argv[1] == "changed" else [None]:
    model = tiny("llama", seed=1)
    entered = change(model) if change else None
    if entered:
        entered.__enter__()
    adaskip_compile.compile(model, SkipPlan.none(), inner="eager")
    off = (logits(model) - eager_logits(model)).abs().max().item()
    graphs = adaskip_compile.report(model).sessions[0].graphs
    found[change.__name__ if change else "plain"] = [off < 1e-5, [graph.restored for graph in graphs]]
    if entered:
        entered.__exit__(None, None, None)
print(json.dumps(found))
"""


def in_new_process(what: str, cache_dir: Path) -> dict[str, Any]:
    environment = {**os.environ, "ADASKIP_CACHE_DIR": str(cache_dir)}
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@kept
@pytest.mark.slow
def test_a_change_before_compile_is_captured_anew_in_the_next_process(tmp_path: Path):
    assert in_new_process("plain", tmp_path) == {"plain": [True, [False]]}
    found = in_new_process("changed", tmp_path)
    assert found == {"plain": [True, [True]], **{change.__name__: [True, [False]] for change in CHANGES}}
    # What was captured of a change serves the next process that makes it, where its guards can be kept.
    found = in_new_process("changed", tmp_path)
    assert [same for same, _ in found.values()] == [True] * (1 + len(CHANGES))
    assert found["plain"] == found["patched_class"] == [True, [True]]
