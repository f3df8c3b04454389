"""Equal views and empties become one, outside of sublayers; anything that could differ stays."""

from __future__ import annotations

import pytest
import torch

from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.merge_equal_nodes import MergeEqualNodes
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream
from tests.captures import first_graph, shared_captures


def merged(function, *values):
    gm = first_graph(function, *values)
    result = run_pipeline(gm, ResidualStream(()), (MergeEqualNodes(),))
    return result.gm, result.history[0].matched


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.unsqueeze(1),
        lambda x: x[..., None, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, 2].expand(5, -1),
        lambda x: x.view(-1, 2),
    ],
    ids=["unsqueeze", "getitem", "transpose", "expand", "view"],
)
def test_equal_views_become_one(view):
    def function(x):
        y = x * 2
        return (view(y) + 1, view(y) * 3)

    x = torch.arange(12.0).reshape(3, 4)
    gm, matched = merged(function, x)
    assert matched >= 1
    for got, wanted in zip(gm.forward(x), function(x), strict=True):
        assert torch.equal(got, wanted)


def test_a_write_through_one_is_seen_through_the_other():
    def function(x):
        y = x * 2
        y.unsqueeze(0).add_(1)
        return (y.unsqueeze(0) * 3,)

    x = torch.arange(3.0)
    gm, matched = merged(function, x)
    assert matched == 1
    assert torch.equal(gm.forward(x)[0], function(x)[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, at: (x[at] + x[at],),  # copies, of which one could be written
        lambda x, at: (x.unsqueeze(0) + x.unsqueeze(1),),
        lambda x, at: (x + 1) * (x + 1),
        lambda x, at: (x.reshape(-1) + x.reshape(-1),),
        lambda x, at: (torch.rand(3) + torch.rand(3), x),
        lambda x, at: (x.unsqueeze(0), x.unsqueeze(0)),  # two results are two objects
    ],
    ids=["index", "other-arguments", "no-view", "maybe-a-copy", "random", "results"],
)
def test_others_stay(function):
    _, matched = merged(function, torch.arange(3.0), torch.tensor([0, 2]))
    assert matched == 0


def test_empties_become_one():
    gm, matched = merged(
        lambda x: (torch.cat([torch.tensor([]), x]), torch.cat([torch.tensor([]), x * 2])), torch.ones(3)
    )
    assert matched == 1
    assert print_graph(gm).count("torch.tensor") == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("place", [0, 1], ids=["prefill", "decode"])
def test_whole_models_compute_the_same_and_keep_their_sublayers(family, place):
    captured = shared_captures(family)[place]
    stream = find_residual_stream(captured.gm)
    result = run_pipeline(captured.gm, stream, (MergeEqualNodes(),))
    assert [one.path for one in result.stream.sublayers] == [one.path for one in stream.sublayers]
    alive = set(result.gm.graph.nodes)
    assert all(alive.issuperset(one.nodes) for one in result.stream.sublayers)
    got = result.gm.forward(*copies(captured.inputs))
    for one, other in zip(got, captured.outputs, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


def copies(values):
    """Return ``values`` for one call: it may write to them."""
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
