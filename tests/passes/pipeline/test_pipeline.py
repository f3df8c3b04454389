from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_passes.errors import PassError
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import parse_pass, pass_text, run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from tests.captures import shared_captures, stream_of

PASSES = (InsertProbes, SkipSublayers, EliminateDeadCode)
ATTENTION, FFN = "blocks.1.attention", "blocks.2.ffn"


@pytest.fixture(scope="module")
def decode():
    return shared_captures("plain")[-1]


def test_the_history_tells_what_each_pass_did(decode):
    passes = (InsertProbes(()), SkipSublayers((ATTENTION, FFN)), EliminateDeadCode())
    result = run_pipeline(decode.gm, stream_of(decode.gm), passes)
    assert [record.text for record in result.history] == [
        "insert-probes{}",
        "skip-sublayers{paths=('blocks.1.attention', 'blocks.2.ffn')}",
        "eliminate-dead-code{}",
    ]
    assert [(record.modified, record.matched) for record in result.history[:2]] == [(False, 0), (True, 2)]
    dead = result.history[2]
    assert dead.matched == dead.nodes_before - dead.nodes_after > 10
    for one, other in zip(result.history, result.history[1:], strict=False):
        assert one.nodes_after == other.nodes_before
    assert result.history[0].nodes_before == len(decode.gm.graph.nodes)
    assert result.history[-1].nodes_after == len(result.gm.graph.nodes)
    assert all(record.seconds > 0 for record in result.history)
    assert str(result).splitlines()[0] == (
        f"insert-probes{{}}: unchanged, matched 0, nodes {len(decode.gm.graph.nodes)} -> {len(decode.gm.graph.nodes)}"
    )


def test_the_captured_graph_stays_as_it_is(decode):
    stream, before = stream_of(decode.gm), print_graph(decode.gm)
    marks = [set(node.meta) for node in decode.gm.graph.nodes]
    result = run_pipeline(decode.gm, stream, (InsertProbes((FFN,)), SkipSublayers((ATTENTION,)), EliminateDeadCode()))
    assert print_graph(decode.gm) == before != print_graph(result.gm)
    assert [set(node.meta) for node in decode.gm.graph.nodes] == marks
    assert stream.skipped == stream.probed == ()
    own = set(result.gm.graph.nodes)
    assert {node for one in result.stream.kept for node in (one.stream_in, one.stream_out, *one.nodes)} <= own


def test_instruments_see_each_pass_after_it_ran(decode):
    seen = []
    passes = (SkipSublayers((FFN,)), EliminateDeadCode())
    run_pipeline(
        decode.gm, stream_of(decode.gm), passes, [lambda item, gm, result: seen.append((item, print_graph(gm), result))]
    )
    assert [item for item, _, _ in seen] == list(passes)
    assert seen[0][1] != seen[1][1]
    assert seen[0][2].stream.skipped == (FFN,)


NAMES = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=60, deadline=None, database=None)
@given(kind=st.sampled_from((InsertProbes, SkipSublayers)), paths=st.lists(NAMES, max_size=3).map(tuple))
def test_the_text_of_a_pass_reads_back(kind, paths):
    assert parse_pass(pass_text(kind(paths)), PASSES) == kind(paths)


@dataclass(frozen=True)
class Many:
    """A pass of several options."""

    name: ClassVar[str] = "many"
    paths: tuple[str, ...] = ()
    factor: float = 1.0
    mode: str = "a b"
    limit: int | None = None


@settings(max_examples=60, deadline=None, database=None)
@given(
    item=st.builds(
        Many,
        st.lists(NAMES, max_size=2).map(tuple),
        st.floats(allow_nan=False, allow_infinity=False),
        NAMES,
        st.none() | st.integers(),
    )
)
def test_several_options_read_back(item):
    assert parse_pass(pass_text(item), (*PASSES, Many)) == item


def test_options_that_are_left_out_have_their_defaults():
    assert parse_pass("skip-sublayers{}", PASSES) == SkipSublayers()
    assert parse_pass("many{mode='x'}", (Many,)) == Many(mode="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold{}", r"no pass reads 'fold\{\}'; there are: insert-probes, skip-sublayers, eliminate-dead-code"),
        ("skip-sublayers", "no pass reads 'skip-sublayers'"),
        ("skip-sublayers{", "no pass reads"),
        ("skip-sublayers{paths=}", "cannot read the options"),
        ("skip-sublayers{path=()}", "cannot read the options.*unexpected keyword argument 'path'"),
        ("skip-sublayers{'a'}", "cannot read the options.*options have names"),
        ("skip-sublayers{paths=print('ran')}", "cannot read the options"),
        ("skip-sublayers{**{'paths': ()}}", "cannot read the options"),
        ("skip-sublayers{)(}", "cannot read the options"),
        ("skip-sublayers{) + f(}", "cannot read the options"),
        ("skip-sublayers{)(paths=()}", "cannot read the options"),
    ],
)
def test_text_that_is_no_pass_is_refused(text, message, capsys):
    with pytest.raises(PassError, match=message):
        parse_pass(text, PASSES)
    assert capsys.readouterr().out == ""
