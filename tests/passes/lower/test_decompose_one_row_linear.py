import pytest
import torch
from torch import nn
from torch.nn import functional

from adaskip_passes.ir.printer import print_graph
from adaskip_passes.lower.decompose_one_row_linear import DecomposeOneRowLinear
from tests.captures import first_graph
from tests.models import weights
from tests.rewriting import applied


def gated(x, gate, up, bias, down):  # in the order of use, which is that of a captured graph's inputs
    hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up, bias)
    return (x + functional.linear(hidden, weight=down),)


def inputs(rows, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (12, 8), (12, 8), (12,), (8, 12)
    made = [nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=False) for shape in shapes]
    return (torch.randn(*rows, 8).to(dtype), *made)


@pytest.mark.parametrize("rows", [(1, 1), (1,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_gives_what_linear_gives(rows, dtype):
    values = inputs(rows, dtype)
    gm = first_graph(gated, *values)
    assert applied(DecomposeOneRowLinear(), gm) == 3
    assert "linear" not in print_graph(gm)
    [got], [wanted] = gm.forward(*values), gated(*values)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_it_happens_once():
    gm = first_graph(gated, *inputs((1, 1)))
    applied(DecomposeOneRowLinear(), gm)
    text = print_graph(gm)
    assert applied(DecomposeOneRowLinear(), gm) == 0
    assert print_graph(gm) == text


@pytest.mark.parametrize("rows", [(2, 1), (1, 3)])
def test_several_rows_are_left_to_the_matrix_library(rows):
    gm = first_graph(gated, *inputs(rows))
    text = print_graph(gm)
    assert applied(DecomposeOneRowLinear(), gm) == 0
    assert print_graph(gm) == text


def test_other_devices_are_left_alone():
    gm = first_graph(
        lambda x, w: (functional.linear(x, w),), torch.randn(1, 8, device="meta"), weights(4, 8).to("meta")
    )
    assert applied(DecomposeOneRowLinear(), gm) == 0
