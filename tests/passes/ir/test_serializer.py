from __future__ import annotations

import json

import pytest
import sympy
import torch

from adaskip_passes.errors import DamagedFileError
from adaskip_passes.ir.graph import tensor_of
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.ir.serializer import read_graph, write_graph
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.captures import first_graph, shared_captures, stream_of

CAPTURES = [("llama", "dynamic"), ("llama", "static"), ("gemma3_text", "dynamic"), ("qwen3_moe", "dynamic")]
CAPTURES += [("gpt2", "dynamic"), ("plain", "dynamic")]


def round_trip(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    return read_graph(json.loads(json.dumps(write_graph(gm))))


@pytest.mark.parametrize(("family", "cache"), CAPTURES)
def test_a_graph_that_was_saved_reads_and_rewrites_as_before(family: str, cache: str):
    for captured in shared_captures(family, cache):
        again = round_trip(captured.gm)
        assert print_graph(again) == print_graph(captured.gm)
        stream, known = find_residual_stream(again), stream_of(captured.gm)
        assert str(stream) == str(known)
        attention, ffn = (
            next(one.path for one in known.sublayers if one.kind == kind) for kind in ("attention", "ffn")
        )
        probed = tuple(one.path for one in known.sublayers if one.path not in (attention, ffn))
        passes = (InsertProbes(probed), SkipSublayers((attention, ffn)), EliminateDeadCode())
        results = [run_pipeline(gm, found, passes) for gm, found in ((again, stream), (captured.gm, known))]
        assert print_graph(results[0].gm) == print_graph(results[1].gm)


def test_saving_changes_nothing():
    (captured, *_) = shared_captures("llama")
    before = print_graph(captured.gm)
    write_graph(captured.gm)
    assert print_graph(captured.gm) == before


def test_a_saved_graph_holds_no_weights():
    (captured, *_) = shared_captures("llama")
    numbers = sum(value.numel() for value in captured.inputs if isinstance(value, torch.nn.Parameter))
    assert len(json.dumps(write_graph(captured.gm))) < 2 * numbers


def test_an_operation_that_is_not_installed_is_stood_in_for():
    gm = first_graph(lambda x: torch.relu(x) + 1, torch.randn(3))
    data = write_graph(gm)
    [call] = [entry for entry in data["nodes"] if "relu" in str(entry["target"])]
    call["target"] = {"function": "no_such_library.ops:fused_relu"}
    again = read_graph(data)
    assert "no_such_library.ops.fused_relu(%x)" in print_graph(again)
    with pytest.raises(NotImplementedError, match=r"no_such_library\.ops\.fused_relu is not installed here"):
        again(torch.randn(3))


@pytest.mark.parametrize(
    "value", [{"no_such_kind": 1}, {"node": "later"}, {"int": ["Add", "s99", 1]}, {"int": ["exec"]}]
)
def test_data_of_an_unknown_kind_is_refused(value: dict):
    data = write_graph(first_graph(lambda x: torch.relu(x) + 1, torch.randn(3)))
    data["nodes"][-2]["args"][1] = value
    with pytest.raises(DamagedFileError):
        read_graph(data)


def test_nested_graphs_and_odd_values_are_kept():
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.cond(x.sum() > 0, lambda a: a + float("inf"), lambda a: a[..., :2:1].repeat(1, 2), (x,))
        return y.to(torch.float64, memory_format=torch.contiguous_format)

    gm = first_graph(function, torch.randn(2, 4))
    assert print_graph(round_trip(gm)) == print_graph(gm)


def test_a_number_that_was_found_to_be_a_constant_is_known_to_be_one():
    """It is the symbol that it was made with, and 3: what reads the graph tells by the first which input gives it."""
    gm = first_graph(lambda x, n: x * n, torch.randn(4), 3, dynamic=True)
    [size] = [value for value in numbers_of(gm) if int(value.node.hint) == 3]
    size.node.shape_env._set_replacement(size.node._expr, sympy.Integer(3), "the test")
    [again] = [value for value in numbers_of(round_trip(gm)) if int(value.node.hint) == 3]
    assert again.node._expr.is_Symbol
    assert again.node.expr == 3


def numbers_of(gm: torch.fx.GraphModule) -> list[torch.SymInt]:
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    return [value for value in values if isinstance(value, torch.SymInt)]


def test_a_tensor_begins_where_it_began():
    base = torch.randn(6, 40)
    gm = first_graph(lambda x: x + 1, base[:, 7:29], dynamic=True)
    offsets = [tensor_of(node).storage_offset() for graph in (gm, round_trip(gm)) for node in inputs_of(graph)]
    assert len(offsets) == 2
    assert [int(one) for one in offsets] == [7, 7]


def inputs_of(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    found = gm.graph.find_nodes(op="placeholder")
    return [node for node in found if isinstance(node.meta.get("example_value"), torch.Tensor)]
