import pytest
import torch
from torch import fx

from adaskip_passes.ir.graph import copy_graph, op_name
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.stream.stream import ResidualStream
from tests.captures import first_graph, run, shared_captures, stream_of

SQUARE = torch.ones(3, 3)


def eliminated(gm):
    gm, _ = copy_graph(gm)
    result = EliminateDeadCode().apply(gm, ResidualStream(()))
    gm.graph.lint()
    gm.recompile()
    return gm, result


def names(gm):
    return [op_name(node) for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


def call_with(gm, **inputs):
    return gm(*(inputs[node.name] for node in gm.graph.find_nodes(op="placeholder")))


def test_what_nothing_needs_goes_and_inputs_stay():
    def function(x, unused):
        torch.tanh(x).exp()
        return (x + 1,)

    gm = fx.symbolic_trace(function)
    shorter, result = eliminated(gm)
    assert (result.modified, result.matched) == (True, 2)
    assert names(gm) == ["tanh", "exp", "add"]
    assert names(shorter) == ["add"]
    assert len(shorter.graph.find_nodes(op="placeholder")) == 2
    assert EliminateDeadCode().apply(shorter, ResidualStream(())) == type(result)(ResidualStream(()), False, 0)


def test_writes_to_the_callers_memory_stay_and_to_dead_temporaries_go():
    def function(cache, x):
        scratch = torch.zeros_like(x)
        scratch.view(-1)[2:].add_(1)
        kept = torch.zeros_like(x)
        kept[0].add_(5)
        cache.index_copy_(0, torch.arange(3), x)
        return (kept * x,)

    gm = first_graph(function, SQUARE.clone(), SQUARE)
    before, (shorter, _) = names(gm), eliminated(gm)
    after = names(shorter)
    assert before.count("zeros_like") == before.count("add_") == 2
    assert after.count("zeros_like") == after.count("add_") == 1
    assert after.count("index_copy_") == 1
    cache = torch.zeros(3, 3)
    x = SQUARE * 2
    torch.testing.assert_close(call_with(shorter, l_cache_=cache, l_x_=x)[0][0], torch.full((3,), 10.0))
    assert torch.equal(cache, x)


def test_a_write_after_the_last_read_of_a_temporary_goes():
    def function(x):
        scratch = torch.zeros_like(x)
        result = scratch + x
        scratch.add_(1)
        return (result,)

    shorter, result = eliminated(first_graph(function, SQUARE))
    assert "add_" not in names(shorter)
    assert result.matched == 1


def test_checks_and_what_they_check_stay():
    def function(x):
        torch._assert_async((x > 0).all())
        return (x + 1,)

    shorter, _ = eliminated(first_graph(function, SQUARE))
    assert {"_assert_async", "all", "gt"} <= set(names(shorter))
    with pytest.raises(RuntimeError):
        shorter(-SQUARE)


def test_switches_of_autocast_stay():
    def function(x, w):
        with torch.autocast("cpu", enabled=False):
            y = x @ w
        return (y,)

    gm = first_graph(function, SQUARE, SQUARE * 2)
    shorter, _ = eliminated(gm)
    assert names(shorter) == names(gm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shorter(SQUARE, SQUARE)[0].dtype == torch.float32


def test_torch_would_lose_the_cache():
    _, decode, _ = shared_captures("llama", "static")
    ours, _ = eliminated(decode.gm)
    theirs, _ = copy_graph(decode.gm)
    theirs.graph.eliminate_dead_code()
    written = names(decode.gm).count("index_copy_")
    assert written == 6
    assert names(ours).count("index_copy_") == written
    assert names(theirs).count("index_copy_") < written


@pytest.mark.parametrize(("name", "cache"), [("gemma3_text", "static"), ("qwen3_moe", "dynamic"), ("gpt2", "static")])
def test_captured_graphs_compute_the_same_without_their_dead_code(name, cache):
    for captured in shared_captures(name, cache):
        shorter, result = eliminated(captured.gm)
        assert result.matched == len(captured.gm.graph.nodes) - len(shorter.graph.nodes)
        got, wanted = run(shorter, captured), run(captured.gm, captured)
        torch.testing.assert_close(got.outputs, wanted.outputs, rtol=0, atol=0)
        torch.testing.assert_close(got.inputs, wanted.inputs, rtol=0, atol=0)
        assert stream_of(captured.gm).paths == stream_of(shorter).paths
