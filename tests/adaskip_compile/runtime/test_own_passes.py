"""Passes of a user's own, and compilers of a user's own behind ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import adaskip_compile
from adaskip_compile import OptionError, SkipPlan
from adaskip_compile.capture.package import why_not
from adaskip_compile.runtime.session import sessions_of
from adaskip_passes.ir.graph import add_placeholder, call
from adaskip_passes.pipeline.pipeline import AddedInput, PassResult, run_pipeline
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream
from tests.doors import compiled_by
from tests.generation import CACHES, generate, make_cache
from tests.models import tiny, tokens

SCALED = "model.layers.1.self_attn"


@dataclass(frozen=True)
class HalveFfns:
    """Add half of what each FFN adds."""

    name: ClassVar[str] = "halve-ffns"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        ffns = [sublayer for sublayer in stream.sublayers if sublayer.kind == "ffn"]
        for ffn in ffns:
            with gm.graph.inserting_after(ffn.branch):
                half = call(gm.graph, torch.mul, ffn.branch, 0.5)
            ffn.stream_out.replace_input_with(ffn.branch, half)
        return PassResult(find_residual_stream(gm), bool(ffns), len(ffns))


@dataclass(frozen=True)
class CallFunctions:
    """Replace what the n-th FFN adds by the n-th of ``functions`` of it."""

    functions: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    name: ClassVar[str] = "call-functions"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        ffns = [sublayer for sublayer in stream.sublayers if sublayer.kind == "ffn"]
        for ffn, function in zip(ffns, self.functions, strict=True):
            with gm.graph.inserting_after(ffn.branch):
                value = call(gm.graph, function, ffn.branch)
            ffn.stream_out.replace_input_with(ffn.branch, value)
        return PassResult(find_residual_stream(gm), True, len(ffns))


@dataclass(frozen=True)
class LoseShape:
    """A broken pass: what the first FFN adds gets one dimension too few."""

    name: ClassVar[str] = "lose-shape"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        ffn = next(sublayer for sublayer in stream.sublayers if sublayer.kind == "ffn")
        with gm.graph.inserting_after(ffn.branch):
            flat = call(gm.graph, torch.flatten, ffn.branch)
        ffn.stream_out.replace_input_with(ffn.branch, flat)
        return PassResult(stream, True, 1)


def halved(model: Any) -> Any:
    """Halve what each FFN adds by hand, in eager mode."""
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, _args, out: out * 0.5)
    return model


def logits(model: Any, call_it: Any, cache: str = "dynamic") -> list[torch.Tensor]:
    """Return the logits of a prompt of nine tokens and two steps after it."""
    ids, held = tokens(1, 12, seed=3), make_cache(cache, model)
    found: list[torch.Tensor] = []
    position = 0
    with torch.no_grad():
        for length in (9, 1, 1):
            span = torch.arange(position, position + length)
            out = call_it(
                ids[:, position : position + length], past_key_values=held, cache_position=span, use_cache=True
            )
            held, position = out.past_key_values, position + length
            found.append(out.logits[:, -1])
    return found


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", CACHES)
def test_it_equals_a_model_that_was_changed_by_hand(cache: str):
    expected = logits(model := halved(tiny("llama", num_hidden_layers=3)), model, cache)
    unchanged = logits(model := tiny("llama", num_hidden_layers=3), model, cache)
    assert not torch.allclose(expected[0], unchanged[0], atol=1e-2)
    adaskip_compile.compile(model, inner="eager", passes=[HalveFfns()])
    assert_close(logits(model, model, cache), expected)
    graphs = [graph for session in sessions_of(model) for graph in session.graphs]
    assert {graph.stream.phase for graph in graphs} == {"prefill", "decode"}


def test_sublayers_are_skipped_beside_it():
    model = halved(tiny("llama", num_hidden_layers=3))
    model.model.layers[1].self_attn.register_forward_hook(lambda _module, _args, out: (out[0] * 0.0, *out[1:]))
    expected = logits(model, model)
    model = tiny("llama", num_hidden_layers=3)
    adaskip_compile.compile(model, SkipPlan.from_scales({SCALED: 1.0}, window=0), inner="eager", passes=[HalveFfns()])
    assert_close(logits(model, model), expected)


@pytest.mark.parametrize("door", ["compile", "model.compile", "torch.compile"])
def test_every_door_takes_it(door: str):
    expected = logits(model := halved(tiny("llama")), model)
    model = tiny("llama")
    compiled = compiled_by(door, model, SkipPlan.none(), inner="eager", passes=[HalveFfns()])
    assert_close(logits(model, compiled), expected)


def test_inductor_compiles_what_it_made():
    expected = logits(model := halved(tiny("llama")), model)
    model = tiny("llama")
    adaskip_compile.compile(model, passes=[HalveFfns()])
    assert_close(logits(model, model), expected)


@pytest.mark.skipif(why_not() is not None, reason=f"captures are not kept: {why_not()}")
def test_it_runs_on_graphs_that_an_earlier_model_has_kept():
    ids = tokens(1, 12, vocabulary=100)
    expected = generate(halved(tiny("llama", seed=2)), ids, torch.ones_like(ids), 4).tolist()
    for seed in (1, 2):
        model = tiny("llama", seed=seed)
        adaskip_compile.compile(model, inner="eager", passes=[HalveFfns()])
        found = generate(model, ids, torch.ones_like(ids), 4).tolist()
    assert all(graph.restored for graph in sessions_of(model)[0].graphs)
    assert found == expected


def test_functions_that_share_a_name_are_told_apart():
    """Regions are shared by what they compute: two lambdas of one line are two computations."""
    quarter, triple = (lambda x, by=by: x * by for by in (0.25, 3.0))
    model = tiny("llama")
    for layer, by in zip(model.model.layers, (0.25, 3.0), strict=True):
        layer.mlp.register_forward_hook(lambda _module, _args, out, by=by: out * by)
    expected = logits(model, model)
    model = tiny("llama")
    adaskip_compile.compile(model, inner="eager", passes=[CallFunctions((quarter, triple))])
    assert_close(logits(model, model), expected)


def test_a_broken_one_is_named_with_its_folder(tmp_path: Path):
    model = tiny("llama")
    adaskip_compile.compile(model, inner="eager", passes=[HalveFfns(), LoseShape()], debug_dir=tmp_path)
    with pytest.raises(Exception, match=r"lose-shape\{\}.*repro\.py") as caught:
        logits(model, model)
    [folder] = tmp_path.iterdir()
    assert folder.name in str(caught.value)
    assert (folder / "03-halve-ffns.diff").read_text().count("torch.mul") == 2
    assert "flatten" in (folder / "04-lose-shape.txt").read_text()


def test_a_graph_that_runs_unskipped_says_that_they_are_left_out():
    class NoStream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    model = NoStream()
    adaskip_compile.compile(model, inner="eager", passes=[HalveFfns()])
    with torch.no_grad():
        model(torch.ones(2, 3, 4))
    assert "passes= are left out" in str(adaskip_compile.report(model))


@pytest.mark.parametrize("given", ["halve", [HalveFfns], [object()], 3])
def test_what_is_no_pass_is_refused(given: Any):
    with pytest.raises(OptionError, match="passes"):
        adaskip_compile.compile(tiny("llama"), passes=given)


def test_capture_graph_returns_what_passes_get():
    gm, stream = adaskip_compile.capture_graph(tiny("llama"))
    result = run_pipeline(gm, stream, [HalveFfns()])
    assert result.stream.paths == stream.paths == adaskip_compile.analyze(tiny("llama")).paths
    assert [record.matched for record in result.history] == [2]


@pytest.mark.parametrize("inner", ["aot_eager", "own"])
def test_any_backend_compiles_the_regions(inner: str):
    compiled: list[int] = []
    aot = torch._dynamo.lookup_backend("aot_eager")

    def own(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(len(gm.graph.nodes))
        return aot(gm, inputs) if inner == "aot_eager" else gm.forward

    plan = SkipPlan.from_scales({SCALED: 1.0}, window=0)
    adaskip_compile.compile(model := tiny("llama", num_hidden_layers=3), plan, inner="eager")
    expected = logits(model, model)
    adaskip_compile.compile(model := tiny("llama", num_hidden_layers=3), plan, inner=own)
    assert_close(logits(model, model), expected)
    assert compiled


def test_inputs_that_nobody_gives_are_refused():
    @dataclass(frozen=True)
    class AddInput:
        name: ClassVar[str] = "add-input"

        def apply(self, gm, stream):
            add_placeholder(gm.graph, "mine", torch.ones(2))
            return PassResult(stream, True, 1, (AddedInput("mine", "mine"),))

    model = tiny("llama")
    adaskip_compile.compile(model, inner="eager", passes=[AddInput()])
    with pytest.raises(Exception, match=r"passes= have added inputs \(mine\)"):
        logits(model, model)
