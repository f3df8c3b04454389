import pytest
import torch

from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import op_name
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import parse_pass, pass_text, run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.fold_scales import FoldScales
from adaskip_passes.specialise.replacements import SCALES_INPUT
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from tests.captures import run, scales_input, shared_captures, stream_of

SCALES = {"model.layers.0.self_attn": 0.971, "model.layers.1.mlp": 1.0 / 3.0}
SKIPS = SkipSublayers(tuple(SCALES))
BAKES = FoldScales(tuple(SCALES.items()))


@pytest.fixture(scope="module", params=["dynamic", "static"])
def captured(request):
    return shared_captures("llama", request.param)[-1]


def readers(gm):
    return [user for node in gm.graph.find_nodes(op="placeholder") if node.name == SCALES_INPUT for user in node.users]


def test_numbers_take_the_place_of_the_input_and_no_bit_changes(captured):
    stream = stream_of(captured.gm)
    given = run_pipeline(captured.gm, stream, (SKIPS, EliminateDeadCode()))
    baked = run_pipeline(captured.gm, stream, (SKIPS, BAKES, EliminateDeadCode()))
    assert len(readers(given.gm)) == 2
    assert readers(baked.gm) == []
    scales = scales_input(stream, SCALES)
    wanted = run(given.gm, captured, scales)
    got = run(baked.gm, captured, torch.full_like(scales, float("nan")))
    for one, other in zip((*got.outputs, *got.inputs), (*wanted.outputs, *wanted.inputs), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)


def test_scales_are_rounded_as_the_input_rounds_them(captured):
    baked = run_pipeline(captured.gm, stream_of(captured.gm), (SKIPS, BAKES)).gm
    numbers = [node.args[1] for node in baked.graph.nodes if op_name(node) == "mul" and isinstance(node.args[1], float)]
    wanted = [torch.tensor(scale, dtype=torch.float32).item() for scale in SCALES.values()]
    assert [number for number in numbers if number in wanted] == wanted
    assert not set(SCALES.values()) & set(numbers)


def test_laws(captured):
    once = run_pipeline(captured.gm, stream_of(captured.gm), (SKIPS, BAKES))
    assert [(record.modified, record.matched) for record in once.history] == [(True, 2), (True, 2)]
    again = run_pipeline(once.gm, once.stream, (BAKES,))
    assert (again.history[0].modified, again.history[0].matched) == (False, 0)
    assert print_graph(again.gm) == print_graph(once.gm)
    assert parse_pass(pass_text(BAKES), (SkipSublayers, FoldScales)) == BAKES


def test_the_stream_names_no_read_that_is_gone(captured):
    body = SkipBodyRows(tuple(SCALES), (), 1, 1)
    prefill = shared_captures("llama", "static")[0]
    baked = run_pipeline(prefill.gm, stream_of(prefill.gm), (body, BAKES))
    nodes = set(baked.gm.graph.nodes)
    assert all(node in nodes for sublayer in baked.stream.sublayers for node in sublayer.nodes)


def test_a_skipped_sublayer_without_a_scale_is_an_error(captured):
    with pytest.raises(PassError, match=r"cannot bake the scale of model\.layers\.1\.mlp"):
        run_pipeline(captured.gm, stream_of(captured.gm), (SKIPS, FoldScales(BAKES.scales[:1])))


def test_nothing_is_baked_where_nothing_is_skipped(captured):
    result = run_pipeline(captured.gm, stream_of(captured.gm), (BAKES,))
    assert (result.history[0].modified, result.history[0].matched) == (False, 0)
