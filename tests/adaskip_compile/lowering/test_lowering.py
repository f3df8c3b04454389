"""What lowering takes care of before Inductor sees a graph."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.capture.dynamo import example_inputs
from adaskip_compile.lowering import lowering
from adaskip_compile.lowering.lowering import Lowering
from adaskip_passes.kernels import banded_attention, many_row_linear, onednn
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from tests.captures import first_graph
from tests.generation import generate, make_cache
from tests.models import tiny, tokens
from tests.reference import run_request


def test_inputs_that_share_a_fake_value_are_two_inputs():
    gm = first_graph(lambda x, y: (x - y,), torch.ones(3), torch.zeros(3))
    first, second = gm.graph.find_nodes(op="placeholder")
    second.meta["example_value"] = first.meta["example_value"]  # as values are shared in a graph that was read
    one, other = example_inputs(gm)
    assert one is not other
    assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    [got] = Lowering("inductor", "whole").lower(DerivedGraph(gm))(torch.full((3,), 5.0), torch.full((3,), 2.0))
    assert torch.equal(got, torch.full((3,), 3.0))


def test_what_has_no_code_for_all_sizes_is_compiled_for_those_seen(monkeypatch):
    import torch._inductor

    compile_standalone = torch._inductor.standalone_compile
    settings: list[bool] = []

    def refuse_any_size(*args, **kwargs):
        any_size = lowering.symbol_config.backed_size_oblivious
        settings.append(any_size)
        if any_size:
            raise RuntimeError("unbacked_bindings")
        return compile_standalone(*args, **kwargs)

    monkeypatch.setattr(torch._inductor, "standalone_compile", refuse_any_size)
    x = torch.randn(7, 3)
    gm = first_graph(lambda x: (x * 2 + 1,), x)
    [got] = Lowering("inductor", "whole").lower(DerivedGraph(gm))(x)
    assert settings == [True, False]
    torch.testing.assert_close(got, x * 2 + 1)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_prompts_are_multiplied_by_the_faster_library(kind, monkeypatch):
    multiply = onednn.multiply
    multiplied: list[tuple[int, ...]] = []

    def counted(x, weight, bias=None):
        multiplied.append(tuple(weight.shape))
        return multiply(x, weight, bias)

    # As on a machine where oneDNN is faster, and with a prompt that is long already.
    for module in (banded_attention, many_row_linear):
        monkeypatch.setattr(module, "onednn_pays", lambda *_: True)
    monkeypatch.setattr(banded_attention, "_MANY", 32)
    monkeypatch.setattr(onednn, "multiply", counted)
    model = tiny(kind, num_hidden_layers=2)
    request = tokens(1, 70), tokens(1, 4, seed=1)
    eager = run_request(model, *request, cache=make_cache("dynamic", model))
    adaskip_compile.compile(model, SkipPlan.none(), inner="inductor")
    got = run_request(model, *request, cache=make_cache("dynamic", model))
    torch.testing.assert_close(got, eager, rtol=2e-5, atol=2e-5)
    layer = model.model.layers[0]
    assert tuple(layer.mlp.down_proj.weight.shape) in multiplied
    assert any(70 in shape for shape in multiplied)  # keys of a head


def test_under_autocast_numbers_are_those_of_eager():
    model = tiny("llama", num_hidden_layers=2)
    request = tokens(1, 70), tokens(1, 4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = run_request(model, *request, cache=make_cache("dynamic", model))
        adaskip_compile.compile(model, SkipPlan.none(), inner="inductor")
        got = run_request(model, *request, cache=make_cache("dynamic", model))
    assert {one.dtype for one in got} == {torch.bfloat16}
    torch.testing.assert_close(got, eager, rtol=0.05, atol=0.05)


def test_a_batch_reads_the_weights_in_place():
    """In bf16 the output projection was a product over a copy of its weights for every row of the batch."""
    vocabulary = 640
    model = tiny("llama", num_hidden_layers=1, vocab_size=vocabulary, tie_word_embeddings=True).bfloat16()
    adaskip_compile.compile(model, SkipPlan.none(), inner="inductor")
    ids = tokens(3, 9)
    generate(model, ids, torch.ones_like(ids), 3)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        generate(model, ids, torch.ones_like(ids), 3)
    shapes = [
        (event.name, shape) for event in recorded.events() or () for shape in event.input_shapes if vocabulary in shape
    ]
    assert ("aten::mm", [64, vocabulary]) in shapes
    assert not [(name, shape) for name, shape in shapes if len(shape) == 3 and 64 in shape]
