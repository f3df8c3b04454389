import pytest
import torch
from torch import fx
from torch.nn import functional

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.ir.graph import op_name
from adaskip_passes.stream.find_stream import find_counters, find_residual_stream
from tests.captures import first_graph, shared_captures, stream_of
from tests.models import weights

SQUARE = torch.ones(3, 3)


@pytest.fixture(scope="module")
def custom_op():
    library = torch.library.Library("adaskip_tests", "FRAGMENT")
    library.define("put(Tensor(a!) cache, Tensor x) -> ()")
    library.impl("put", lambda cache, x: (cache.copy_(x), None)[1], "CompositeExplicitAutograd")
    library._register_fake("put", lambda cache, x: None)
    yield torch.ops.adaskip_tests.put
    library._destroy()


def written(function, *inputs):
    """Which node writes which root, by the ops' names."""
    gm = first_graph(function, *inputs)
    return [(op_name(write.node), write.root.name) for write in find_effects(gm).writes]


def in_place(how):
    def function(cache, x):
        how(cache, x)
        return x + 1

    return function


WRITES = {
    "method": lambda cache, x: cache.add_(x),
    "index_copy": lambda cache, x: cache.index_copy_(0, torch.arange(3), x),
    "operator": lambda cache, x: cache.__iadd__(x),
    "item": lambda cache, x: cache.__setitem__(0, x[0]),
    "view": lambda cache, x: cache[1:].view(6)[2:].copy_(x.view(9)[:4]),
    "transposed": lambda cache, x: cache.T.copy_(x),
    "matrix transposed": lambda cache, x: cache.mT.copy_(x),
    "adjoint": lambda cache, x: cache.adjoint().copy_(x),
    "columns": lambda cache, x: cache.hsplit(3)[1].zero_(),
    "at least": lambda cache, x: torch.atleast_2d(cache).copy_(x),
    "data": lambda cache, x: cache.data.copy_(x),
    "split": lambda cache, x: cache.chunk(3)[1].zero_(),
    "out": lambda cache, x: torch.mul(x, 2, out=cache),
    "list": lambda cache, x: torch._foreach_add_([cache], [x]),
    "inplace flag": lambda cache, x: functional.relu(cache, inplace=True),
    "inplace position": lambda cache, x: functional.dropout(cache, 0.5, False, True),
}


@pytest.mark.parametrize("how", WRITES.values(), ids=WRITES)
def test_every_way_to_write_the_callers_memory_is_seen(how):
    found = written(in_place(how), SQUARE.clone(), SQUARE.clone())
    assert [root for _, root in found] == ["l_cache_"]


def test_custom_ops_write_what_their_schema_says(custom_op):
    def function(cache, x):
        custom_op(cache, x)
        custom_op.default(cache, x)
        return x + 1

    assert [root for _, root in written(function, SQUARE.clone(), SQUARE)] == ["l_cache_"] * 2


def test_operators_that_only_look_in_place_write_nothing():
    def function(mask, other):
        return (mask & other) | (mask ^ other), functional.relu(mask.float(), inplace=False)

    assert written(function, SQUARE > 0, SQUARE > 0) == []


def test_an_ffn_that_combines_the_callers_masks_is_stateless():
    def function(x, w, mask, other):
        x = x + (x @ w) * (mask & other)
        return (x,)

    gm = first_graph(function, torch.randn(2, 3, 3), weights(3, 3), SQUARE > 0, SQUARE > 0)
    [sublayer] = find_residual_stream(gm).sublayers
    assert (sublayer.kind, sublayer.stateful, sublayer.writes) == ("ffn", False, ())


def test_temporaries_are_roots_of_their_own():
    def function(x):
        scratch = torch.zeros_like(x)
        scratch[0].add_(1)
        return scratch + x

    [(name, root)] = written(function, SQUARE)
    assert name == "add_"
    assert root.startswith(("scratch", "zeros_like"))


def test_a_reader_depends_on_the_writes_before_it_and_no_other():
    def function(cache, x, y):
        early = cache * 2
        cache.add_(x)
        late = cache * 3
        cache.add_(y)
        return early, late

    gm = first_graph(function, SQUARE.clone(), SQUARE, SQUARE * 2)
    dependence = Dependence(gm, find_effects(gm))
    x, y = (next(node for node in gm.graph.nodes if node.name == name) for name in ("l_x_", "l_y_"))
    early, late = (node for node in gm.graph.nodes if op_name(node) == "mul")
    first, _ = (node for node in gm.graph.nodes if op_name(node) == "add_")
    assert not dependence.depends(early, x)
    assert dependence.depends(late, x)
    assert dependence.depends(late, first)
    assert not dependence.depends(late, y)
    assert dependence.reaches(late, late)
    assert not dependence.depends(late, late)


def test_sizes_are_no_dependence():
    def function(x, y):
        return y.reshape(x.shape[0], -1) + torch.zeros_like(x).sum()

    gm = first_graph(function, SQUARE, torch.ones(9))
    dependence = Dependence(gm, find_effects(gm))
    x = next(node for node in gm.graph.nodes if node.name == "l_x_")
    result = next(node for node in gm.graph.nodes if op_name(node) == "add")
    assert not dependence.depends(result, x)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_preallocated_caches_belong_to_the_attention_that_writes_them(name):
    first, decode, second = shared_captures(name, "static")
    for captured in (decode, second):
        stream = stream_of(captured.gm)
        for sublayer in stream.sublayers:
            layer = sublayer.path.split(".")[2]
            held = [node.name for node in sublayer.cache_inputs]
            assert len(held) == len(sublayer.writes) == (2 if sublayer.kind == "attention" else 0)
            assert all(f"layers_{layer}_" in name for name in held)
            assert sublayer.stateful == (sublayer.kind == "attention")
        assert {node.meta["example_value"].dim() for node in find_counters(captured.gm, stream)} == {0}
    for sublayer in stream_of(first.gm).sublayers:
        expected = 2 if sublayer.kind == "attention" else 0
        assert (len(sublayer.cache_inputs), len(sublayer.writes), len(sublayer.cache_outputs)) == (
            0,
            expected,
            expected,
        )


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "plain"])
def test_growing_caches_go_in_and_out_of_the_attention_that_extends_them(name):
    prefill, *_, decode = shared_captures(name)
    for captured, inputs in ((prefill, 0), (decode, 2)):
        stream = stream_of(captured.gm)
        taken = [position for sublayer in stream.sublayers for position in sublayer.cache_outputs]
        assert len(taken) == len(set(taken)) == len(stream.sublayers)
        for sublayer in stream.sublayers:
            attends = sublayer.kind == "attention"
            assert (len(sublayer.cache_inputs), len(sublayer.cache_outputs)) == ((inputs, 2) if attends else (0, 0))
        assert find_counters(captured.gm, stream) == ()


def test_a_method_of_python_s_own_is_no_view():
    """``torch.ops.aten.__eq__`` is there, and compares namespaces."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    equal = graph.call_method("__eq__", (x, x))
    graph.output((equal,))
    effects = find_effects(fx.GraphModule(torch.nn.Module(), graph))
    assert effects.roots[equal] is equal
