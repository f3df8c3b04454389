import torch

from adaskip_passes.ir.graph import op_name, output_values
from adaskip_passes.lower.pin_layout import PinLayout
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.stream.stream import NO_STREAM
from tests.captures import first_graph


def test_outputs_that_were_captured_contiguous_come_out_so():
    """Once each; what was not, and what the caller gave, is as it was."""

    def function(x):
        y = x + 1
        return y, y, y.mT, x

    gm = first_graph(function, torch.ones(2, 3))
    result = run_pipeline(gm, NO_STREAM, (PinLayout(),))
    before, after = [[node for node in output_values(one) if node is not None] for one in (gm, result.gm)]
    assert result.history[0].matched == 1
    assert [op_name(node) for node in after] == [
        "contiguous" if op_name(node) == "add" else op_name(node) for node in before
    ]
    assert len({node for node in after if op_name(node) == "contiguous"}) == 1


def test_where_there_is_nothing_to_pin_it_says_so():
    gm = first_graph(lambda x: ((x + 1).mT,), torch.ones(2, 3))
    assert not run_pipeline(gm, NO_STREAM, (PinLayout(),)).history[0].modified
