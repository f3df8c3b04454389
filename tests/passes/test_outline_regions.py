import pytest
import torch
from torch import fx

from adaskip_passes.effects import op_name
from adaskip_passes.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.insert_probes import InsertProbes
from adaskip_passes.outline_regions import outline_regions, region_key
from adaskip_passes.pipeline import run_pipeline
from adaskip_passes.residual_stream import find_residual_stream
from adaskip_passes.skip_sublayers import SkipSublayers
from adaskip_passes.textual import print_graph
from tests.captures import first_graph, run, scales_input, shared_captures, stream_of

GRAPHS = [
    ("llama", "dynamic"),
    ("llama", "static"),
    ("gemma3_text", "static"),
    ("gpt2", "dynamic"),
    ("plain", "dynamic"),
]


def specialise(captured, skipped=(), probed=()):
    passes = (InsertProbes(tuple(probed)), SkipSublayers(tuple(skipped)), EliminateDeadCode())
    return run_pipeline(captured.gm, stream_of(captured.gm), passes)


def outline(captured, skipped=()):
    result = specialise(captured, skipped)
    return outline_regions(result.gm, result.stream)


def regions(outlined):
    return [(name, part) for name, part in outlined.gm.named_children() if isinstance(part, fx.GraphModule)]


@pytest.mark.parametrize(("name", "cache"), GRAPHS)
def test_the_wiring_computes_what_the_graph_computes(name, cache):
    for captured in shared_captures(name, cache):
        stream = stream_of(captured.gm)
        for skipped, probed in (
            ((), ()),
            ((), stream.paths),
            (stream.paths[:1], stream.paths[1:2]),
            (stream.paths[2:4], stream.paths[-1:]),
            (stream.paths, ()),
        ):
            result = specialise(captured, skipped, probed)
            text = print_graph(result.gm)
            outlined = outline_regions(result.gm, result.stream)
            assert print_graph(result.gm) == text
            scales = [scales_input(stream, dict.fromkeys(skipped, 0.9))] if skipped else []
            got, wanted = run(outlined.gm, captured, *scales), run(result.gm, captured, *scales)
            torch.testing.assert_close(got.outputs, wanted.outputs, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(got.inputs, wanted.inputs, rtol=0, atol=0)
            assert all(node.op in ("placeholder", "output", "call_module") or op_name(node) == "getitem"
                       for node in outlined.gm.graph.nodes)  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("llama", 8), ("qwen3_moe", 6), ("plain", 14)])
def test_equal_layers_have_equal_keys(name, count):
    for captured in shared_captures(name):
        keys = list(outline(captured).keys.values())
        assert len(keys) == count
        assert len(set(keys)) <= 5
        assert len(set(keys[3:-1:2])) == len(set(keys[4:-1:2])) == 1
        assert len({keys[0], keys[1], keys[2], keys[-1]}) == 4


@pytest.mark.parametrize(
    ("name", "cache"),
    [("llama", "dynamic"), ("llama", "static"), ("gpt2", "dynamic"), ("plain", "dynamic")],
)
def test_skipping_needs_no_region_that_the_full_graph_lacks(name, cache):
    for captured in shared_captures(name, cache):
        known, paths = set(outline(captured).keys.values()), stream_of(captured.gm).paths
        for skipped in (*((path,) for path in paths), paths[:2], paths[1:3], paths[-3:]):
            if name == "gpt2" and paths[0] in skipped:
                continue  # its embedding's dropout lies in the first attention's region
            outlined = outline(captured, skipped)
            assert set(outlined.keys.values()) <= known, skipped
            assert len(outlined.keys) == len(paths) + 2 - len(skipped)


def test_probes_need_no_new_region():
    for captured in shared_captures("llama"):
        known, paths = set(outline(captured).keys.values()), stream_of(captured.gm).paths
        result = specialise(captured, paths[:1], paths[1::2])
        assert set(outline_regions(result.gm, result.stream).keys.values()) <= known


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
        outlined = outline(captured, stream_of(captured.gm).paths[:1])
        for _, region in regions(outlined):
            values = region.graph.output_node().args[0]
            if isinstance(values, tuple):
                places = {node: index for index, node in enumerate(region.graph.nodes)}
                assert sorted(values, key=places.__getitem__) == list(values)


def test_bookkeeping_of_skipped_sublayers_is_not_compiled():
    _, decode, _ = shared_captures("llama", "static")
    stream = stream_of(decode.gm)
    outlined = outline(decode, [one.path for one in stream.sublayers if one.kind == "attention"])
    counting = [
        name for name, region in regions(outlined) if any(op_name(node) == "add_" for node in region.graph.nodes)
    ]
    assert len(counting) == 3
    assert not set(counting) & outlined.keys.keys()


def test_a_stream_is_found_again_in_the_specialised_graph():
    prefill = shared_captures("llama")[0]
    result = specialise(prefill, ["model.layers.1.mlp"])
    assert find_residual_stream(result.gm).paths == tuple(one.path for one in result.stream.kept)
