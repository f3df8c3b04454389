import pytest
import torch

from adaskip_passes.open_slices import close_slices
from adaskip_passes.textual import print_graph
from tests.captures import first_graph

INDICES = [
    (slice(None), slice(-1, None)),
    (slice(None), slice(2, None, 2)),
    (Ellipsis, slice(1, None), slice(None)),
    (None, slice(None), slice(-3, None), None, slice(2, 4)),
    (0, slice(1, None)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_end_is_written_out_and_nothing_else_changes(index):
    x = torch.arange(2 * 7 * 5).reshape(2, 7, 5)
    torch._dynamo.mark_dynamic(x, 1)
    gm = first_graph(lambda x: (x[index] + 0,), x)
    assert close_slices(gm) == 1
    assert "size" in print_graph(gm)
    for length in (7, 4, 11):
        x = torch.arange(2 * length * 5).reshape(2, length, 5)
        inputs = [x if node.meta["example_value"].__class__ is not torch.SymInt else length for node in placeholders(gm)]
        torch.testing.assert_close(gm.forward(*inputs)[0], x[index] + 0)
    assert close_slices(gm) == 0


@pytest.mark.parametrize("index", [(slice(None), slice(1, 3)), (slice(1, None),), (Ellipsis, slice(-2, None))], ids=str)
def test_ends_that_are_known_are_left_alone(index):
    x = torch.zeros(2, 7, 5)
    torch._dynamo.mark_dynamic(x, 1)
    gm = first_graph(lambda x: (x[index] + 0,), x)
    assert close_slices(gm) == 0


def placeholders(gm):
    return gm.graph.find_nodes(op="placeholder")
