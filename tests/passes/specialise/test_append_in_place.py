from dataclasses import replace

import pytest
import torch

from adaskip_passes.ir.graph import output_values
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.pipelines import STRAIGHTEN
from adaskip_passes.specialise.append_in_place import GROWN_INPUT, AppendInPlace, find_appends, token_major
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.stream import NO_STREAM
from tests.captures import run, scales_input, shared_captures, stream_of
from tests.models import PlainAttention, capture_all, plain

# Of each cache, prefill and decode: how many outputs are concatenations of what came in and what is new.
MATCHED = {
    ("llama", "dynamic"): (6, 6),
    ("llama", "static"): (0, 0),
    ("gemma3_text", "dynamic"): (2, 2),  # a sliding window keeps a part of the concatenation
    ("plain", "dynamic"): (0, 12),  # its prefill concatenates nothing
}


def grown_inputs(captured, appends):
    """Return what the caller hands in: room in which the past stands, and what is not yet written is NaN."""
    places = {node: place for place, node in enumerate(captured.gm.graph.find_nodes(op="placeholder"))}
    for append in appends:
        shape = captured.outputs[append.position].shape
        grown = torch.full((shape.numel(),), float("nan")).as_strided(shape, token_major(shape))
        if append.past is not None:
            past = captured.inputs[places[append.past]]
            grown.narrow(-2, 0, past.shape[-2]).copy_(past)
        yield grown


@pytest.mark.parametrize(("name", "cache"), MATCHED)
def test_the_same_values_without_a_concatenation(name, cache):
    graphs = {one.phase: one for one in shared_captures(name, cache)}
    for captured, matched in zip(graphs.values(), MATCHED[name, cache], strict=True):
        stream, text = stream_of(captured.gm), print_graph(captured.gm)
        appends = find_appends(captured.gm, stream)
        result = run_pipeline(captured.gm, stream, (AppendInPlace(),))
        assert print_graph(captured.gm) == text
        assert (len(appends), result.history[0].matched, result.history[0].modified) == (matched, matched, matched > 0)
        positions = [append.position for append in appends]
        returned = list(map(str, output_values(result.gm)))
        assert [returned[position] for position in positions] == [f"{GROWN_INPUT}_{n}" for n in positions]
        got = run(result.gm.forward, captured, *grown_inputs(captured, appends))
        wanted = run(captured.gm.forward, captured)
        for one, other in zip(got.outputs, wanted.outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_skipped_attention_has_no_use_for_room():
    captured = shared_captures("llama")[-1]
    stream = stream_of(captured.gm)
    path = "model.layers.1.self_attn"
    result = run_pipeline(captured.gm, stream, (AppendInPlace(), SkipSublayers((path,)), EliminateDeadCode()))
    grown = [node for node in result.gm.graph.find_nodes(op="placeholder") if node.name.startswith(GROWN_INPUT)]
    assert [bool(node.users) for node in grown] == [append.path != path for append in find_appends(captured.gm, stream)]
    inputs = list(grown_inputs(captured, find_appends(captured.gm, stream)))
    got = run(result.gm.forward, captured, *inputs, scales_input(stream, {path: 0.9}))
    alone = run_pipeline(captured.gm, stream, (SkipSublayers((path,)), EliminateDeadCode()))
    wanted = run(alone.gm.forward, captured, scales_input(stream, {path: 0.9}))
    kept = [position for one in stream.sublayers if one.path != path for position in one.cache_outputs]
    for position in (*kept, len(got.outputs) - 1):
        torch.testing.assert_close(got.outputs[position], wanted.outputs[position], rtol=1e-5, atol=1e-5)


def transposed(self, q, k, v, causal):
    """Attend, and when decoding read keys by a view that only memory with the heads outermost has."""
    if causal:
        return PlainAttention.attend(self, q, k, v, causal)
    return PlainAttention.attend(self, q, k + 0 * k.view(k.shape[0] * k.shape[1], -1).sum(), v, causal)


def widened(self, q, k, v, causal):
    return PlainAttention.attend(self, q, k.contiguous(), v.contiguous(), causal)


@pytest.mark.parametrize(("attend", "matched"), [(transposed, 2), (widened, 4)])
def test_readers_decide(attend, matched, monkeypatch):
    """Where a reader cannot take the tokens outermost, the concatenation stays; where it can, what it yields is told right."""
    model = plain(cached=True)
    for block in model.blocks:
        monkeypatch.setattr(block.attention, "attend", attend.__get__(block.attention))
    captured = capture_all(model)[-1]
    straight = run_pipeline(captured.gm, NO_STREAM, STRAIGHTEN)
    result = run_pipeline(straight.gm, straight.stream, (AppendInPlace(),))
    assert result.history[0].matched == matched
    appends = find_appends(straight.gm, straight.stream)
    got = run(result.gm.forward, captured, *grown_inputs(replace(captured, gm=straight.gm), appends))
    wanted = run(captured.gm.forward, captured)
    for one, other in zip(got.outputs, wanted.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
