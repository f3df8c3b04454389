"""Laws that every pass keeps on every decoder: STYLE's list, over depths, shapes and caches."""

import functools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import parse_pass, pass_text, run_pipeline
from adaskip_passes.specialise.append_in_place import AppendInPlace
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.narrow_rows import NarrowRows
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.captures import run, shared_captures, stream_of
from tests.models import capture_all, plain, tiny
from tests.rewriting import applied

# Each example captures a model, so none is spent on shrinking.
FEW = settings(deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
PASSES = (AppendInPlace, InsertProbes, SkipSublayers, SkipBodyRows, NarrowRows, EliminateDeadCode)

PLAIN = st.builds(
    lambda **shape: ("plain", tuple(shape.items())),
    layers=st.integers(1, 4),
    parallel=st.booleans(),
    cached=st.booleans(),
    kv_heads=st.sampled_from((1, 2, 4)),
    norms=st.sampled_from(("pre", "post", "sandwich")),
    multiplier=st.sampled_from((1.0, 0.5)),
    tied=st.booleans(),
    experts=st.sampled_from((0, 2)),
)
LLAMA = st.builds(
    lambda **shape: ("llama", (("num_hidden_layers", 1), *shape.items())),
    num_key_value_heads=st.sampled_from((1, 2, 4)),
    tie_word_embeddings=st.booleans(),
)


@functools.cache
def captures(kind, shape):
    model = plain(**dict(shape)) if kind == "plain" else tiny(kind, **dict(shape))
    return tuple(capture_all(model))


def assert_laws(gm, stream, passes):
    """Run ``passes`` one at a time: each verifies, tells truly whether it changed the text, and is done after one run."""
    for item in passes:
        assert parse_pass(pass_text(item), PASSES) == item
        before = print_graph(gm)
        once = run_pipeline(gm, stream, (item,))
        after = print_graph(once.gm)
        assert once.history[0].modified == (after != before), item
        again = run_pipeline(once.gm, once.stream, (item,))
        assert (print_graph(again.gm), again.history[0].modified) == (after, False)
        gm, stream = once.gm, once.stream
    return gm


def assert_never_mutates(gm):
    def state():
        return [(node, node.name, node.args, dict(node.kwargs), dict(node.meta)) for node in gm.graph.nodes]

    before = state()
    first, second = find_residual_stream(gm), find_residual_stream(gm)
    assert first == second
    assert state() == before


def draw_passes(data, stream):
    skipped = data.draw(st.lists(st.sampled_from(stream.paths), unique=True))
    kept = [path for path in stream.paths if path not in skipped]
    rows = draw_row_passes(data, stream)
    probed = data.draw(st.lists(st.sampled_from(kept), unique=True)) if kept and not rows else []
    probes, skips = InsertProbes(tuple(probed)), SkipSublayers(tuple(skipped))
    first, second = data.draw(st.permutations([probes, skips]))
    return AppendInPlace(), *rows, first, EliminateDeadCode(), second, EliminateDeadCode()


def draw_row_passes(data, stream):
    """Return passes that leave a prompt some rows, none for a decode step; a graph that is probed keeps all of them."""
    if stream.phase != "prefill" or data.draw(st.booleans()):
        return ()
    body = data.draw(st.lists(st.sampled_from(stream.paths), unique=True))
    return SkipBodyRows(tuple(body), head=1, tail=2), NarrowRows(2), EliminateDeadCode()


def laws_hold(shape, data):
    captured = data.draw(st.sampled_from(captures(*shape)))
    applied(StraightenStream(), captured.gm)
    stream = find_residual_stream(captured.gm)
    assert not stream.problems
    assert [item.kind for item in stream.sublayers] == ["attention", "ffn"] * (len(stream.paths) // 2)
    assert_never_mutates(captured.gm)
    assert_probes_change_no_bit(captured, stream)
    assert_laws(captured.gm, stream, draw_passes(data, stream))


def assert_probes_change_no_bit(captured, stream):
    probed = run_pipeline(captured.gm, stream, (InsertProbes(stream.paths),))
    plain_run, probed_run = run(captured.gm.forward, captured), run(probed.gm.forward, captured)
    for got, wanted in zip(probed_run.outputs[:-1], plain_run.outputs, strict=True):
        assert torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got == wanted


@settings(FEW, max_examples=12)
@given(shape=PLAIN, data=st.data())
def test_laws_of_plain_decoders(shape, data):
    laws_hold(shape, data)


@settings(FEW, max_examples=3)
@given(shape=LLAMA, data=st.data())
def test_laws_of_llamas(shape, data):
    laws_hold(shape, data)


@pytest.mark.parametrize(("name", "cache"), [("gemma3_text", "static"), ("qwen3_moe", "dynamic")])
def test_laws_of_deeper_families(name, cache):
    for captured in shared_captures(name, cache):
        stream = stream_of(captured.gm)
        passes = (
            AppendInPlace(),
            InsertProbes(stream.paths[1:3]),
            SkipSublayers(stream.paths[:1]),
            EliminateDeadCode(),
        )
        assert_laws(captured.gm, stream, passes)
        assert_never_mutates(captured.gm)


@pytest.mark.parametrize("name", ["plain", "llama", "gpt2"])
def test_an_empty_plan_changes_nothing(name):
    for captured in shared_captures(name):
        result = run_pipeline(captured.gm, stream_of(captured.gm), (InsertProbes(()), SkipSublayers(())))
        assert print_graph(result.gm) == print_graph(captured.gm)
        assert [(record.modified, record.matched) for record in result.history] == [(False, 0)] * 2
        assert result.stream.paths == stream_of(captured.gm).paths


def test_two_captures_are_rewritten_to_the_same_text():
    texts = []
    for _ in range(2):
        captured = capture_all(plain(layers=3, cached=True))
        streams = [find_residual_stream(one.gm) for one in captured]
        passes = (InsertProbes(("blocks.0.ffn",)), SkipSublayers(("blocks.1.attention",)), EliminateDeadCode())
        results = [run_pipeline(one.gm, stream, passes) for one, stream in zip(captured, streams, strict=True)]
        texts.append([(print_graph(result.gm), str(result.stream)) for result in results])
    assert texts[0] == texts[1]
