import functools

import pytest
import torch
from torch import fx

from adaskip_passes.analysis.regions import Region, region_key, regions_of
from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import copy_graph, fake_value
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.outline_regions import OutlineRegions
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.captures import first_graph, run, scales_input, shared_captures, stream_of
from tests.generation import CACHES, make_cache
from tests.models import FAMILIES, tiny, tokens, weights
from tests.reference import run_request
from tests.rewriting import applied

GRAPHS = [
    ("llama", "dynamic"),
    ("llama", "static"),
    ("gemma3_text", "static"),
    ("gpt2", "dynamic"),
    ("plain", "dynamic"),
]


def passes_for(skipped=(), probed=()):
    return InsertProbes(tuple(probed)), SkipSublayers(tuple(skipped)), EliminateDeadCode()


@functools.cache
def outlined(gm):
    return run_pipeline(gm, stream_of(gm), (OutlineRegions(),))


@pytest.mark.parametrize(("name", "cache"), GRAPHS)
def test_passes_on_the_wiring_do_what_they_do_on_the_graph(name, cache):
    for captured in shared_captures(name, cache):
        stream, text = stream_of(captured.gm), print_graph(captured.gm)
        wiring = outlined(captured.gm)
        assert print_graph(captured.gm) == text
        for skipped, probed in (
            ((), ()),
            ((), stream.paths),
            (stream.paths[:1], stream.paths[1:2]),
            (stream.paths[2:4], stream.paths[-1:]),
            (stream.paths, ()),
        ):
            passes = passes_for(skipped, probed)
            whole, cut = run_pipeline(captured.gm, stream, passes), run_pipeline(wiring.gm, wiring.stream, passes)
            scales = [scales_input(stream, dict.fromkeys(skipped, 0.9))] if skipped else []
            got, wanted = run(cut.gm.forward, captured, *scales), run(whole.gm.forward, captured, *scales)
            torch.testing.assert_close(got.outputs, wanted.outputs, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(got.inputs, wanted.inputs, rtol=0, atol=0)
            assert (cut.stream.paths, cut.stream.skipped) == (whole.stream.paths, whole.stream.skipped)
            assert sum(isinstance(node.target, Region) for node in cut.gm.graph.nodes) <= len(stream.paths) + 2


@pytest.mark.parametrize(("name", "count"), [("llama", 8), ("qwen3_moe", 6), ("plain", 14)])
def test_equal_layers_have_equal_keys(name, count):
    for captured in shared_captures(name):
        keys = [region.key for region in regions_of(outlined(captured.gm).gm)]
        assert len(keys) == count
        assert len(set(keys)) == 4  # before, attention, ffn, behind
        assert len(set(keys[1:-1:2])) == len(set(keys[2:-1:2])) == 1


def test_a_skipped_sublayer_costs_no_region():
    for captured in (*shared_captures("llama"), *shared_captures("llama", "static")):
        wiring, paths = outlined(captured.gm), stream_of(captured.gm).paths
        for skipped in (*((path,) for path in paths), paths[:2], paths[1:3], paths[-3:]):
            result = run_pipeline(wiring.gm, wiring.stream, passes_for(skipped))
            called = [node.target for node in result.gm.graph.nodes if isinstance(node.target, Region)]
            assert len(called) == len(paths) + 2 - len(skipped)
            assert set(called) <= set(regions_of(wiring.gm))


def test_regions_tell_what_they_write():
    _, decode, _ = shared_captures("llama", "static")
    wiring = outlined(decode.gm)
    stream = wiring.stream
    assert [len(one.writes) for one in stream.sublayers] == [1, 0] * 3
    assert (
        sum(len(region.written_inputs) for region in regions_of(wiring.gm)) == 2 * 3 + 3
    )  # keys and values; token counts


def test_reads_and_writes_of_one_memory_keep_their_order():
    def function(x, w, count):
        x = x + torch.relu(x @ w) * count
        count.add_(1)
        x = x + torch.relu(x @ w) * count
        count.mul_(2)
        return (x + torch.tanh(x @ w) * count,)

    inputs = (torch.randn(2, 3, 8), weights(8, 8), torch.ones(()))
    gm = first_graph(function, *inputs)
    wiring = run_pipeline(gm, find_residual_stream(gm), (OutlineRegions(),))
    got = wiring.gm.forward(*(value.clone() for value in inputs))
    torch.testing.assert_close(got, function(*(value.clone() for value in inputs)), rtol=0, atol=0)


def key_of(function, *inputs):
    return region_key(first_graph(function, *inputs))


def norm(x, w, eps=1e-5):
    return (x * w * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps),)


X, W = torch.randn(2, 8), torch.randn(8)


def test_a_key_does_not_depend_on_names_and_values():
    def renamed(stream, weight):
        scaled = stream * weight
        return (scaled * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-5),)

    assert key_of(norm, X, W) == key_of(renamed, X + 1, W * 2)


DIFFERENT = {
    "shape": lambda: key_of(norm, torch.randn(3, 8), W),
    "stride": lambda: key_of(norm, torch.randn(8, 2).T, W),
    "dtype": lambda: key_of(norm, X.double(), W.double()),
    "one dtype": lambda: key_of(norm, X, W.double()),
    "constant": lambda: key_of(lambda x, w: norm(x, w, 1e-6), X, W),
    "keyword": lambda: key_of(
        lambda x, w: (x * w * torch.rsqrt(x.square().mean(-1, keepdim=True, dtype=torch.float32) + 1e-5),), X, W
    ),
    "op": lambda: key_of(lambda x, w: (x * w * torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5),), X, W),
    "operand order": lambda: key_of(
        lambda x, w: (w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5),), X, W
    ),
    "wiring": lambda: key_of(lambda x, w: (x * w * torch.rsqrt(w.square().mean(-1, keepdim=True) + 1e-5),), X, W),
    "output": lambda: key_of(lambda x, w: (*norm(x, w), x * w), X, W),
    "device": lambda: key_of(norm, X.to("meta"), W.to("meta")),
}


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_has_another_key(other):
    assert other() != key_of(norm, X, W)


def dynamic_key(function, *inputs):
    graphs: list[fx.GraphModule] = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=True)(*inputs)
    return region_key(graphs[0])


def test_symbols_count_by_which_are_equal():
    def product(x, y):
        return (x.sum() + y.sum(),)

    equal = dynamic_key(product, torch.ones(4, 5), torch.ones(5, 4))
    assert equal == dynamic_key(product, torch.ones(6, 7), torch.ones(7, 6))
    assert equal != dynamic_key(product, torch.ones(4, 5), torch.ones(4, 5))
    assert equal != dynamic_key(product, torch.ones(4, 4), torch.ones(4, 4))


def test_regions_return_values_in_the_order_in_which_they_compute_them():
    for captured in shared_captures("llama", "static"):
        for region in regions_of(outlined(captured.gm).gm):
            places = {node: index for index, node in enumerate(region.gm.graph.nodes)}
            values = region.gm.graph.output_node().args[0]
            assert isinstance(values, tuple)
            assert sorted(values, key=places.__getitem__) == list(values)


def sizes_of(value):
    if isinstance(value, torch.Tensor):
        return [*value.shape, *value.stride(), value.storage_offset()]
    return [size for item in value for size in sizes_of(item)] if isinstance(value, (tuple, list)) else [value]


def missing_symbols(region):
    """Return the symbols of the sizes in a region that none of its inputs gives, as Inductor reads inputs."""
    used, given = set(), set()
    for node in region.gm.graph.nodes:
        value = fake_value(node)
        sizes = [size for size in sizes_of(value) if isinstance(size, (torch.SymInt, torch.SymBool))]
        used.update(*(size.node.expr.free_symbols for size in sizes))
        if node.op == "placeholder":  # a number gives the symbol that it was made with, a tensor those of its sizes now
            number = isinstance(value, torch.SymInt)
            given.update(size.node._expr if number else size.node.expr for size in sizes)
    return used - given


QUICK = ("llama", "gemma3_text", "bloom")


@pytest.mark.newest("Dynamo of 2.11 breaks at baddbmm of bloom with a static cache")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "family", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
)
def test_a_region_is_given_every_symbol_in_it(family, cache):
    graphs: list[fx.GraphModule] = []

    def backend(gm, example_inputs):
        applied(StraightenStream(), gm)
        graphs.append(gm)
        for region in regions_of(run_pipeline(gm, find_residual_stream(gm), (OutlineRegions(),)).gm):
            assert not missing_symbols(region), f"graph {len(graphs)}, {region.__name__}"
        return gm.forward

    model = tiny(family)
    with torch._dynamo.config.patch(specialize_float=True):
        compiled = torch.compile(model._call_impl, backend=backend, dynamic=True)
        run_request(compiled, tokens(2, 9), tokens(2, 2), cache=make_cache(cache, model))
    assert len(graphs) > 1


def test_a_stream_is_found_again_in_the_specialised_graph():
    prefill = shared_captures("llama")[0]
    result = run_pipeline(prefill.gm, stream_of(prefill.gm), passes_for(["model.layers.1.mlp"]))
    assert find_residual_stream(result.gm).paths == tuple(one.path for one in result.stream.kept)


def test_a_graph_that_calls_graphs_is_not_cut():
    model = tiny("llama", num_hidden_layers=2)
    model.set_attn_implementation("flex_attention")
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(tokens(1, 20), use_cache=False)
    gm = next(gm for gm in graphs if "flex_attention" in print_graph(gm))
    with pytest.raises(PassError, match="is no value that a region could be given"):
        run_pipeline(gm, find_residual_stream(gm), (OutlineRegions(),))


def test_nodes_of_a_region_have_the_names_that_they_had():
    """An input ``X`` and a node ``x`` are two: left to itself, a graph calls both ``x``."""
    captured = shared_captures("llama")[1]
    gm, images = copy_graph(captured.gm)
    stream = stream_of(captured.gm).mapped(images.__getitem__)
    sublayer = stream.sublayers[2]
    sublayer.stream_in.name, sublayer.nodes[1].name = "X", "x"
    for region in regions_of(run_pipeline(gm, stream, (OutlineRegions(),)).gm):
        region.gm.graph.lint()
        assert {node.name for node in region.gm.graph.nodes} - {"output"} <= {node.name for node in gm.graph.nodes}
