import pytest
import torch
from torch import fx

from adaskip_passes.errors import PassError, UnknownSublayerError
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import STATISTICS, InsertProbes
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.captures import first_graph, run, scales_input, shared_captures, stream_of
from tests.models import Captured, capture, tiny, weights
from tests.reference import InterpreterReference, measure

ATTENTION, FFN, LAST = "model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.2.self_attn"


class Watcher(InterpreterReference):
    """Keeps a copy of every value at the moment it is computed."""

    def __init__(self, gm: fx.GraphModule, skips) -> None:
        super().__init__(gm, skips)
        self.seen = {}

    def run_node(self, n):
        value = super().run_node(n)
        self.seen[n.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def expected_rows(captured, stream, paths, scales=None):
    """Compute the statistics in float64 from the values that an interpreter sees."""
    skips = {
        stream.by_path(path).stream_out.name: (scale, stream.by_path(path).stream_in.name)
        for path, scale in (scales or {}).items()
    }
    watcher = Watcher(captured.gm, skips)
    run(watcher.run, captured)
    rows = []
    for path in paths:
        sublayer = stream.by_path(path)
        a, b = (watcher.seen[node.name] for node in (sublayer.stream_in, sublayer.stream_out))
        stats = measure(a.reshape(1, -1, a.shape[-1]), b.reshape(1, -1, b.shape[-1]))
        rows.append([stats.similarity, stats.scale_token, stats.scale_frobenius])
    return torch.tensor(rows)


def probe(captured, stream, *passes):
    return run_pipeline(captured.gm, stream, (*passes, EliminateDeadCode()))


@pytest.mark.parametrize(
    ("name", "cache"), [("llama", "static"), ("gemma3_text", "dynamic"), ("gpt2", "dynamic"), ("plain", "dynamic")]
)
def test_rows_equal_statistics_in_float64_and_nothing_else_changes(name, cache):
    for captured in shared_captures(name, cache):
        stream = stream_of(captured.gm)
        paths = stream.paths[::-1]
        result = probe(captured, stream, InsertProbes(paths))
        got, full = run(result.gm, captured), run(captured.gm, captured)
        *others, rows = got.outputs
        torch.testing.assert_close(rows, expected_rows(captured, stream, paths), rtol=2e-6, atol=2e-6)
        assert rows.shape == (len(paths), len(STATISTICS))
        torch.testing.assert_close(tuple(others), full.outputs, rtol=0, atol=0)
        torch.testing.assert_close(got.inputs, full.inputs, rtol=0, atol=0)
        assert (result.stream.probed, result.history[0].matched) == (paths, len(paths))


@pytest.mark.parametrize("probes_first", [True, False])
def test_probes_measure_the_skipped_stream_in_either_order(probes_first):
    scales = {ATTENTION: 0.8, FFN: 1.3}
    for captured in shared_captures("llama"):
        stream = stream_of(captured.gm)
        paths = tuple(path for path in stream.paths if path not in scales)
        passes = (InsertProbes(paths), SkipSublayers(tuple(scales)))
        result = probe(captured, stream, *(passes if probes_first else passes[::-1]))
        rows = run(result.gm, captured, scales_input(stream, scales)).outputs[-1]
        torch.testing.assert_close(rows, expected_rows(captured, stream, paths, scales), rtol=1e-5, atol=1e-5)
        unskipped = expected_rows(captured, stream, paths)
        assert (rows - unskipped)[-1].abs().max() > 1e-4


def test_bfloat16_streams_are_measured_in_float32():
    model = tiny("llama", num_hidden_layers=1).bfloat16()
    for captured in capture(model, batch=2):
        stream = find_residual_stream(captured.gm)
        rows = run(probe(captured, stream, InsertProbes(stream.paths)).gm, captured).outputs[-1]
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected_rows(captured, stream, stream.paths), rtol=1e-5, atol=1e-5)


def assert_measured(function, *inputs):
    gm = first_graph(function, *inputs)
    places = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert len(places) == len(inputs)
    captured = Captured(gm, inputs, function(*(value.clone() for value in inputs)), "prefill", 1)
    stream = find_residual_stream(gm)
    assert len(stream.paths) == 2
    outputs = run(probe(captured, stream, InsertProbes(stream.paths)).gm, captured).outputs
    torch.testing.assert_close(outputs[:-1], captured.outputs, rtol=0, atol=0)
    torch.testing.assert_close(outputs[-1], expected_rows(captured, stream, stream.paths), rtol=1e-5, atol=1e-5)
    return outputs[-1]


def test_a_stream_written_in_place_is_measured_before_it_is_overwritten():
    def function(embedded, w, v):
        x = torch.tanh(embedded)
        x += torch.relu(x @ w)
        x += torch.tanh(x @ v)
        return (x * 2,)

    rows = assert_measured(function, torch.randn(2, 3, 8), weights(8, 8), weights(8, 8))
    assert rows[:, 0].max() < 0.999


def test_a_stream_whose_rank_changes_is_measured_token_by_token():
    def function(x, w, v):
        y = x.reshape(-1, 8)
        y = y + torch.relu(y @ w)
        z = y.reshape(x.shape)
        return (z + torch.tanh(z @ v),)

    assert_measured(function, torch.randn(2, 3, 8), weights(8, 8), weights(8, 8))


def test_a_stream_of_zeros_gives_numbers():
    def function(x, w, v):
        x = x + x @ w
        return (x + torch.relu(x @ v),)

    inputs = (torch.zeros(1, 3, 8), weights(8, 8), weights(8, 8))
    gm = first_graph(function, *inputs)
    stream = find_residual_stream(gm)
    captured = Captured(gm, inputs, (), "prefill", 1)
    rows = run(probe(captured, stream, InsertProbes(stream.paths)).gm, captured).outputs[-1]
    assert torch.equal(rows, torch.zeros(2, 3))


def test_errors_name_the_sublayer():
    captured = shared_captures("llama")[0]
    stream = stream_of(captured.gm)
    with pytest.raises(UnknownSublayerError, match=r"no sublayer 'model\.layers\.9\.mlp'.*it has: .*layers\.2\.mlp"):
        probe(captured, stream, InsertProbes(("model.layers.9.mlp",)))
    with pytest.raises(PassError, match="has probes already"):
        probe(captured, stream, InsertProbes((FFN,)), InsertProbes((LAST,)))
    with pytest.raises(PassError, match=rf"cannot probe {FFN}: it is skipped"):
        probe(captured, stream, SkipSublayers((FFN,)), InsertProbes((FFN,)))
    with pytest.raises(PassError, match=rf"cannot skip {FFN}: it is probed"):
        probe(captured, stream, InsertProbes((FFN,)), SkipSublayers((FFN,)))


def test_probing_the_same_again_changes_nothing():
    captured = shared_captures("llama")[0]
    result = probe(captured, stream_of(captured.gm), InsertProbes((FFN,)), InsertProbes((FFN,)))
    assert [record.modified for record in result.history[:2]] == [True, False]
