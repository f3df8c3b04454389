from dataclasses import replace

import pytest
import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental import _config as config

from adaskip_compile.lowering.lowering import Lowering
from adaskip_compile.lowering.shape_checks import AssumptionCheck, ShapeCheck
from adaskip_passes.errors import LegalityError
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.captures import first_graph, run, scales_input, shared_captures, stream_of
from tests.models import capture_all, plain


def skipped(captured, paths):
    stream = find_residual_stream(captured.gm)
    result = run_pipeline(captured.gm, stream, (SkipSublayers(paths), EliminateDeadCode()))
    outputs = run(result.gm, captured, scales_input(stream, dict.fromkeys(paths, 0.9))).outputs
    return ShapeCheck(captured.gm, result.gm), outputs


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_what_a_skipped_graph_returns_has_the_shapes_of_the_full_one(name):
    for captured in shared_captures(name):
        for path in stream_of(captured.gm).paths[::2]:
            check, outputs = skipped(captured, (path,))
            check.check(captured.inputs, outputs)


def test_caches_that_part_ways_are_noticed_at_run_time():
    with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # a symbol a layer
        decode = capture_all(plain(layers=2, cached=True))[-1]
    hole, kept = (find_residual_stream(decode.gm).by_path(f"blocks.{i}.attention") for i in (0, 1))
    check, outputs = skipped(decode, (hole.path,))
    check.check(decode.inputs, outputs)
    places = decode.gm.graph.find_nodes(op="placeholder")
    inputs = list(decode.inputs)
    for node in kept.cache_inputs:
        inputs[places.index(node)] = inputs[places.index(node)][:, :, 1:]
    shorter = replace(decode, inputs=tuple(inputs))
    check, outputs = skipped(shorter, (hole.path,))
    with pytest.raises(
        LegalityError, match=r"should have the shape \(1, 4, \d+, 16\).*keep one sublayer of each cache"
    ):
        check.check(shorter.inputs, outputs)


def test_a_graph_that_skips_nothing_has_nothing_to_check():
    captured = shared_captures("llama")[0]
    ShapeCheck(captured.gm, captured.gm).check((), (torch.ones(1),))


def size_inputs(gm, *tensors):
    """Return what ``gm`` takes in a call with ``tensors``, all of one length."""
    rest = iter(tensors)
    inputs = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    return [next(rest) if isinstance(value, torch.Tensor) else tensors[0].shape[0] for value in inputs]


def test_what_compiling_assumes_of_sizes_is_checked_in_every_call(monkeypatch):
    """Lower with a compiler that bakes the length of the first call into its code."""

    def specialising(gm, example_inputs, **how):
        length = int(next(value for value in example_inputs if isinstance(value, torch.SymInt)))
        return lambda *inputs: (torch.full((length,), 7.0),)

    monkeypatch.setattr(torch._inductor, "standalone_compile", specialising)
    notes = []
    gm = first_graph(lambda x: (x + 1,), torch.ones(5), dynamic=True)
    run = Lowering("inductor", "whole", notes.append).lower(DerivedGraph(gm))
    assert run(*size_inputs(gm, torch.ones(5)))[0].tolist() == [7.0] * 5
    assert not notes
    for _ in range(2):
        assert run(*size_inputs(gm, torch.ones(6)))[0].tolist() == [2.0] * 6
    assert notes
    assert "Eq(s" in notes[0]


@pytest.mark.newest("older ones know no option for it")
@pytest.mark.parametrize("length", [5, 6000])
def test_sums_assume_nothing_of_their_length(length):
    gm = first_graph(lambda x: (x.softmax(-1),), torch.ones(length), dynamic=True)
    lowering = Lowering("inductor", "whole")
    run = lowering.lower(DerivedGraph(gm))
    assert not lowering.assumed
    for other in (7, 5000):
        values = torch.randn(other)
        torch.testing.assert_close(run(*size_inputs(gm, values))[0], values.softmax(-1))


def test_what_is_assumed_of_a_size_that_no_input_tells_does_not_hold():
    gm = first_graph(lambda x: (x + 1,), torch.ones(5), dynamic=True)
    notes = []
    unknown = sympy.Eq(sympy.Symbol("s999", integer=True), 3)
    check = AssumptionCheck(gm, [unknown], lambda *_: "compiled", lambda *_: "plain", notes.append)
    assert check(*size_inputs(gm, torch.ones(5))) == "plain"
    assert "s999" in notes[0]


def test_nothing_is_assumed_of_constants(monkeypatch):
    """Lower with a compiler that makes a symbol for a constant, and says so."""

    def with_constant(gm, example_inputs, **how):
        env = next(value.node.shape_env for value in example_inputs if isinstance(value, torch.SymInt))
        made = env.create_symbol(-1, ConstantSource("made"), positive=None)
        assert bool(env.create_symintnode(made, hint=-1) == -1)
        return gm.forward

    monkeypatch.setattr(torch._inductor, "standalone_compile", with_constant)
    lowering = Lowering("inductor", "whole")
    lowering.lower(DerivedGraph(first_graph(lambda x: (x + 1,), torch.ones(5), dynamic=True)))
    assert not lowering.assumed
