import functools

import pytest
import torch

from adaskip_passes.analysis.regions import Region, regions_of, symbols_of
from adaskip_passes.ir.graph import fake_value, op_name
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.outline_regions import OutlineRegions
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.specialise.stream_maps import FORMS, part_shapes
from tests.captures import run, scales_input, shared_captures, stream_of

RANK = 4
WIDTH = 64


@functools.cache
def outlined(gm):
    return run_pipeline(gm, stream_of(gm), (OutlineRegions(),))


def skips(forms):
    """Return passes that skip the sublayers in ``forms``, path to the form of their map or None for a scale."""
    maps = tuple((path, form, RANK) for path, form in forms.items() if form)
    return SkipSublayers(tuple(forms), maps), EliminateDeadCode()


def skip_on_wiring(captured, forms):
    """Return the wiring with ``forms`` in the place of sublayers, and the regions that stand for them, call by call."""
    wiring = outlined(captured.gm)
    result = run_pipeline(wiring.gm, wiring.stream, skips(forms))
    targets = [node.target for node in result.gm.graph.nodes if isinstance(node.target, Region)]
    return result.gm, [target for target in targets if target not in regions_of(wiring.gm)]


def tensors(forms):
    """Return tensors of maps as graphs take them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for form in forms.values() if form for shape in part_shapes(form, WIDTH, RANK).values()]
    return [torch.randn(shape, generator=generator) / 8 for shape in shapes]


@pytest.mark.parametrize(("name", "cache"), [("llama", "dynamic"), ("llama", "static"), ("gpt2", "dynamic")])
def test_maps_are_calls_of_one_region_a_form(name, cache):
    for captured in shared_captures(name, cache):
        stream = stream_of(captured.gm)
        # Two in a row, then two of other forms, and a scale.
        forms = dict(zip(stream.paths[1:], ("low_rank", "low_rank", "affine", "gated", None), strict=False))
        whole = run_pipeline(captured.gm, stream, skips(forms))
        cut, called = skip_on_wiring(captured, forms)
        assert [region.__name__ for region in called] == ["low_rank_map", "low_rank_map", "affine_map", "gated_map"]
        assert called[0] is called[1]
        assert print_graph(cut).count("_map(") == 4
        assert {"linear", "rms_norm"}.isdisjoint(map(op_name, cut.graph.nodes))
        assert print_graph(whole.gm).count("rms_norm(") == 4
        values = (scales_input(stream, dict.fromkeys(forms, 0.9)), *tensors(forms))
        got, wanted = run(cut.forward, captured, *values), run(whole.gm.forward, captured, *values)
        torch.testing.assert_close(got.outputs, wanted.outputs, rtol=0, atol=0)
        torch.testing.assert_close(got.inputs, wanted.inputs, rtol=0, atol=0)


def test_another_skip_set_has_the_same_key():
    for captured in shared_captures("llama"):
        paths = stream_of(captured.gm).paths
        [one], [other, _] = (
            skip_on_wiring(captured, dict.fromkeys(chosen, "low_rank"))[1] for chosen in (paths[1:2], paths[3:5])
        )
        assert one is not other
        assert one.key == other.key
        [affine] = skip_on_wiring(captured, {paths[1]: "affine"})[1]
        assert affine.key != one.key


def test_the_region_is_given_the_symbols_of_its_shapes():
    prefill, decode = shared_captures("llama")[:2]
    for captured, count in ((prefill, 1), (decode, 0)):  # the number of tokens
        _, [region] = skip_on_wiring(captured, {stream_of(captured.gm).paths[1]: "low_rank"})
        inputs = region.gm.graph.find_nodes(op="placeholder")
        sizes = [node for node in inputs if isinstance(fake_value(node), torch.SymInt)]
        assert len(inputs) == 1 + len(FORMS["low_rank"]) + count
        given = {fake_value(node).node._expr: node for node in sizes}
        assert list(symbols_of(inputs[:1], given)) == sizes
        assert len(sizes) == count


def test_what_takes_one_op_is_no_region():
    for captured in shared_captures("llama"):
        paths = stream_of(captured.gm).paths
        cut, called = skip_on_wiring(captured, {paths[1]: "channel", paths[2]: None})
        assert not called
        assert [print_graph(cut).count(op) for op in ("torch.addcmul(", "torch.mul(")] == [1, 1]
