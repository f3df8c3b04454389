from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_passes.errors import PassError, UnknownSublayerError
from adaskip_passes.ir.graph import op_name
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.replacements import SCALES_INPUT
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_counters, find_residual_stream
from tests.captures import first_graph, run, run_reference, scales_input, shared_captures, stream_of
from tests.models import Captured, capture, tiny, weights

GRAPHS = [
    ("llama", "dynamic"),
    ("llama", "static"),
    ("gemma3_text", "dynamic"),
    ("gemma3_text", "static"),
    ("gpt2", "dynamic"),
    ("gpt2", "static"),
    ("qwen3_moe", "dynamic"),
    ("qwen3_moe", "static"),
    ("plain", "dynamic"),
]
COSTLY = ("linear", "addmm", "_grouped_mm", "scaled_dot_product_attention", "index_copy_")


def ops(nodes):
    return Counter(name for node in nodes if (name := op_name(node)) in COSTLY)


def skip(captured, paths):
    return run_pipeline(captured.gm, stream_of(captured.gm), (SkipSublayers(tuple(paths)), EliminateDeadCode()))


def assert_skips(captured, scales):
    """Hold the skipping of ``scales`` against the reference, and hold that what was skipped is gone."""
    stream = stream_of(captured.gm)
    result = skip(captured, scales)
    got = run(result.gm, captured, scales_input(stream, scales))
    wanted = run_reference(captured, scales)
    skipped = [stream.by_path(path) for path in scales]
    kept = [sublayer for sublayer in stream.sublayers if sublayer.path not in scales]
    holes = {position for sublayer in skipped for position in sublayer.cache_outputs}
    assert len(got.outputs) == len(wanted.outputs)
    for position, (one, other) in enumerate(zip(got.outputs, wanted.outputs, strict=True)):
        if position in holes:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert_inputs(captured, skipped, got, wanted)
    assert_memory(kept, skipped, got.outputs)
    assert_gone(captured, kept, skipped, result, got.outputs)
    return got, wanted, result


def assert_inputs(captured, skipped, got, wanted):
    """Skipped sublayers wrote nothing; everything else was left as the reference left it."""
    places = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    untouched = {node for sublayer in skipped for node in sublayer.cache_inputs}
    for place, before, one, other in zip(places, captured.inputs, got.inputs, wanted.inputs, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, before) if place in untouched else torch.allclose(one, other, atol=1e-5), place


def assert_memory(kept, skipped, outputs):
    """A skipped sublayer's cache outputs lie in a kept one's memory, or all in one."""

    def storages(sublayers, slot):
        held = [sublayer.cache_outputs[slot] for sublayer in sublayers if len(sublayer.cache_outputs) > slot]
        return {(tuple(outputs[i].shape), outputs[i].untyped_storage()._cdata) for i in held}

    for slot in (0, 1):
        owned = storages(kept, slot)
        borrowed = storages(skipped, slot) - owned
        shapes = [shape for shape, _ in borrowed]
        assert len(shapes) == len(set(shapes))
        assert not set(shapes) & {shape for shape, _ in owned}


def assert_gone(captured, kept, skipped, result, outputs):
    before, after = ops(captured.gm.graph.nodes), ops(result.gm.graph.nodes)
    removed = sum((ops(sublayer.nodes) for sublayer in skipped), Counter())
    assert removed
    for name in ("scaled_dot_product_attention", "index_copy_", "_grouped_mm"):
        assert after[name] == before[name] - removed[name], name
    left = sum(after[name] - before[name] + removed[name] for name in ("linear", "addmm"))
    # Where no kept sublayer has a cache of that shape, one of the skipped goes on computing its keys and values.
    orphans = cache_shapes(skipped, outputs) - cache_shapes(kept, outputs)
    assert 0 <= left <= 2 * len(orphans)
    assert left == 0 or orphans


def cache_shapes(sublayers, outputs):
    return {tuple(tuple(outputs[i].shape) for i in one.cache_outputs) for one in sublayers if one.cache_outputs}


def scaled(paths):
    return {path: 0.7 + 0.05 * index for index, path in enumerate(paths)}


@pytest.mark.parametrize(("name", "cache"), GRAPHS)
def test_skip_sets_equal_the_reference(name, cache):
    for captured in shared_captures(name, cache):
        stream = stream_of(captured.gm)
        third = len(stream.paths) // 3
        assert_skips(captured, scaled(stream.paths[:1]))  # the attention that positions are read from
        assert_skips(captured, scaled(stream.paths[1:3]))  # two adjacent ones, of two layers
        assert_skips(captured, scaled([one.path for one in stream.sublayers[-third:] if one.kind == "ffn"]))
        assert_skips(captured, scaled(stream.paths))

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def any_skip_set_equals_the_reference(data):
        captured = data.draw(st.sampled_from(shared_captures(name, cache)))
        paths = data.draw(st.sets(st.sampled_from(stream_of(captured.gm).paths), min_size=1))
        assert_skips(captured, {path: data.draw(st.floats(-1, 2, width=32)) for path in sorted(paths)})

    any_skip_set_equals_the_reference()


@pytest.mark.parametrize("name", ["llama", "gpt2", "plain"])
def test_the_first_of_all_attentions_goes_on_computing_its_cache(name):
    for captured in shared_captures(name):
        attentions = [one for one in stream_of(captured.gm).sublayers if one.kind == "attention"]
        got, wanted, result = assert_skips(captured, scaled([one.path for one in attentions]))
        for slot, position in enumerate(attentions[0].cache_outputs):
            torch.testing.assert_close(got.outputs[position], wanted.outputs[position], rtol=1e-5, atol=1e-5)
            held = {got.outputs[one.cache_outputs[slot]].untyped_storage()._cdata for one in attentions}
            assert len(held) == 1
        assert ops(result.gm.graph.nodes)["scaled_dot_product_attention"] == 0


def test_caches_of_another_shape_are_not_borrowed():
    prefill = shared_captures("gemma3_text")[0]
    stream = stream_of(prefill.gm)
    sliding, full = ([stream.by_path(f"model.layers.{i}.self_attn") for i in layers] for layers in ((0, 2), (1,)))
    got, wanted, _ = assert_skips(prefill, scaled([one.path for one in sliding]))
    first, second = (one.cache_outputs[0] for one in sliding)
    assert got.outputs[first].shape != got.outputs[full[0].cache_outputs[0]].shape
    assert got.outputs[first].untyped_storage()._cdata == got.outputs[second].untyped_storage()._cdata
    torch.testing.assert_close(got.outputs[first], wanted.outputs[first], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_preallocated_caches_go_on_counting_tokens(name):
    _, decode, prefill = shared_captures(name, "static")
    for captured, tokens in ((decode, 1), (prefill, 23)):
        stream = stream_of(captured.gm)
        counters = find_counters(captured.gm, stream)
        attentions = [one.path for one in stream.sublayers if one.kind == "attention"]
        assert len(counters) >= 1
        got, _, result = assert_skips(captured, scaled(attentions))
        inputs = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
        assert {node.name for node in find_counters(result.gm, result.stream)} == {node.name for node in counters}
        for counter in counters:
            place = inputs.index(counter)
            assert int(got.inputs[place]) - int(captured.inputs[place]) == tokens


def test_scales_are_an_input_for_all_sublayers():
    prefill = shared_captures("llama")[0]
    stream, path = stream_of(prefill.gm), "model.layers.1.mlp"
    result = skip(prefill, [path])
    last = [node for node in result.gm.graph.nodes if node.op == "placeholder"][-1]
    assert last.name == SCALES_INPUT
    assert last.meta["example_value"].shape == (len(stream.paths),)
    for scale in (0.5, 1.5):
        got = run(result.gm, prefill, scales_input(stream, {path: scale}))
        torch.testing.assert_close(got.outputs[0], run_reference(prefill, {path: scale}).outputs[0])


def test_skips_add_up():
    for captured in shared_captures("llama", "static"):
        stream = stream_of(captured.gm)
        first, second = stream.paths[0:1], stream.paths[2:4]
        steps = (SkipSublayers(first), EliminateDeadCode(), SkipSublayers(second), EliminateDeadCode())
        result = run_pipeline(captured.gm, stream, steps)
        assert result.stream.skipped == (*first, *second)
        assert [one.path for one in result.stream.kept] == [*stream.paths[1:2], *stream.paths[4:]]
        scales = scaled((*first, *second))
        got, wanted = run(result.gm, captured, scales_input(stream, scales)), run_reference(captured, scales)
        torch.testing.assert_close(got.outputs[0], wanted.outputs[0], rtol=1e-5, atol=1e-5)


def test_a_skipped_bfloat16_sublayer_stays_in_its_dtype():
    for captured in capture(tiny("llama", num_hidden_layers=1).bfloat16()):
        path = "model.layers.0.mlp"
        stream = find_residual_stream(captured.gm)
        result = run_pipeline(captured.gm, stream, (SkipSublayers((path,)), EliminateDeadCode()))
        got, wanted = (
            run(result.gm, captured, scales_input(stream, {path: 0.83})),
            run_reference(captured, {path: 0.83}),
        )
        assert got.outputs[0].dtype == torch.bfloat16
        torch.testing.assert_close(got.outputs[0], wanted.outputs[0], rtol=2e-2, atol=2e-2)


def test_a_stream_whose_rank_changes_is_skipped_whole():
    def flattened(x, w, v):
        y = x.reshape(-1, 8)
        y = y + torch.relu(y @ w)
        z = y.reshape(x.shape)
        z = torch.tanh(z @ v) + z
        return (z,)

    inputs = (torch.randn(2, 3, 8), weights(8, 8), weights(8, 8))
    gm = first_graph(flattened, *inputs)
    captured = Captured(gm, inputs, tuple(flattened(*inputs)), "prefill", 1)
    stream = find_residual_stream(gm)
    assert len(stream.paths) == 2
    for paths in (stream.paths[:1], stream.paths[1:], stream.paths):
        scales = scaled(paths)
        result = run_pipeline(gm, stream, (SkipSublayers(paths), EliminateDeadCode()))
        assert sum(op_name(node) in ("matmul", "tanh", "relu") for node in result.gm.graph.nodes) == 4 - 2 * len(paths)
        got = run(result.gm, captured, scales_input(stream, scales))
        wanted = inputs[0]
        for index, path in enumerate(stream.paths):
            moved = torch.relu(wanted @ inputs[1]) if index == 0 else torch.tanh(wanted @ inputs[2])
            wanted = scales[path] * wanted if path in scales else wanted + moved
        torch.testing.assert_close(got.outputs[0], wanted)


def test_an_unknown_sublayer_is_refused_with_the_nearest():
    prefill = shared_captures("llama")[0]
    with pytest.raises(UnknownSublayerError, match=r"layers\.0\.self_atn.*nearest is 'model\.layers\.0\.self_attn'"):
        skip(prefill, ["model.layers.0.self_atn"])


def test_a_sublayer_whose_values_are_read_stays():
    def sharing(x, w, v):
        inner = torch.relu(x @ w)
        x = x + inner
        x = x + torch.tanh(x @ v) * inner
        return (x,)

    gm = first_graph(sharing, torch.randn(2, 3, 8), weights(8, 8), weights(8, 8))
    stream = find_residual_stream(gm)
    first, second = stream.paths
    assert stream.sublayers[0].shared_with == (second,)
    with pytest.raises(PassError, match="are read by"):
        run_pipeline(gm, stream, (SkipSublayers((first,)),))
    both = run_pipeline(gm, stream, (SkipSublayers((first, second)), EliminateDeadCode()))
    assert not any(op_name(node) == "matmul" for node in both.gm.graph.nodes)
