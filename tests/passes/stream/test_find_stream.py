import pytest
import torch
from torch import nn

from adaskip_passes.errors import UnknownSublayerError
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.captures import first_graph, shared_captures, stream_of
from tests.models import weights

X, W, V = torch.randn(2, 3, 8), weights(8, 8), weights(8, 8)


def found(function, *inputs):
    return find_residual_stream(first_graph(function, *inputs))


def test_a_graph_without_a_stream_says_why():
    stream = found(lambda x, w: (torch.relu(x @ w) @ w,), X, W)
    assert (stream.sublayers, stream.paths, stream.kept) == ((), (), ())
    assert stream.problems == ("no add joins a value with a branch computed from it",)
    assert str(stream) == "no residual stream: no add joins a value with a branch computed from it"


def test_the_sum_of_two_embeddings_is_no_stream():
    def function(ids, words, positions):
        embedded = nn.functional.embedding(ids, words) + nn.functional.embedding(ids, positions)
        return (torch.relu(embedded),)

    assert found(function, torch.tensor([[1, 2]]), W, V).problems


def test_two_streams_are_told_apart_from_one():
    def function(x, w, v):
        left = right = torch.tanh(x @ w)
        for _ in range(2):
            left = left + torch.relu(left @ w)
            right = right + torch.relu(right @ v)
        return (left * right,)

    stream = found(function, X, W, V)
    assert stream.sublayers == ()
    [problem] = stream.problems
    assert "stream" in problem
    assert str(stream).startswith("no residual stream: ")


def test_a_stream_that_is_found_has_no_problems():
    stream = found(lambda x, w, v: ((y := x + torch.relu(x @ w)) + torch.relu(y @ v),), X, W, V)
    assert (len(stream.sublayers), stream.problems) == (2, ())
    assert all((one.kind, one.stateful) == ("ffn", False) for one in stream.sublayers)


@pytest.mark.parametrize(
    ("name", "attention", "ffn"),
    [
        ("llama", "model.layers.{}.self_attn", "model.layers.{}.mlp"),
        ("gemma3_text", "model.layers.{}.self_attn", "model.layers.{}.mlp"),
        ("qwen3_moe", "model.layers.{}.self_attn", "model.layers.{}.mlp"),
        ("gpt2", "transformer.h.{}.attn", "transformer.h.{}.mlp"),
        ("plain", "blocks.{}.attention", "blocks.{}.ffn"),
    ],
)
def test_sublayers_have_the_names_of_their_modules(name, attention, ffn):
    for captured in shared_captures(name):
        stream = stream_of(captured.gm)
        layers = range(len(stream.paths) // 2)
        assert stream.paths == tuple(path.format(layer) for layer in layers for path in (attention, ffn))
        assert [one.kind for one in stream.sublayers] == ["attention", "ffn"] * len(layers)
        assert [one.stateful for one in stream.sublayers] == [True, False] * len(layers)
        assert stream.phase == captured.phase
        for one, other in zip(stream.sublayers, stream.sublayers[1:], strict=False):
            assert one.stream_out is other.stream_in
        assert all(one.shared_with == () for one in stream.sublayers)


def test_a_table_lists_the_sublayers():
    stream = stream_of(shared_captures("llama")[0].gm)
    lines = str(stream).splitlines()
    assert lines[1].split() == ["1", "model.layers.0.mlp", "ffn", "stateless"]
    assert len(lines) == 6


def test_an_unknown_path_is_answered_with_the_known_ones():
    stream = stream_of(shared_captures("llama")[0].gm)
    with pytest.raises(UnknownSublayerError, match=r"nearest is .model\.layers\.2\.mlp.; it has: model\.layers\.0"):
        stream.by_path("layers.2.mlp")
