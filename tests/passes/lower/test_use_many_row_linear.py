"""Products of many rows, against ``linear`` in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from adaskip_passes.kernels import many_row_linear, onednn
from adaskip_passes.kernels.many_row_linear import MANY_ROW_LINEAR
from adaskip_passes.lower.use_many_row_linear import UseManyRowLinear
from tests.models import weights
from tests.rewriting import applied


@pytest.fixture(params=[True, False], ids=["onednn", "linear"], autouse=True)
def faster(request, monkeypatch):
    """Each answer that a machine may give, whatever this one's is."""
    monkeypatch.setattr(many_row_linear, "onednn_pays", lambda threads: request.param)
    monkeypatch.setattr(many_row_linear, "onednn_pays_for_batch", lambda threads, batch: request.param)


def linear_in_float64(x, weight, bias):
    result = x.double() @ weight.double().T
    return result if bias is None else result + bias.double()


def operands(rows, width, out, *, bias):
    generator = torch.Generator().manual_seed(math.prod(rows) + width + out)
    shapes = [(*rows, width), (out, width), *([(out,)] if bias else [])]
    x, weight, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, (rest[0] if bias else None)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from(
        [(), (31,), (32,), (1, 33), (2, 100), (3, 2, 40), (0,), (2, 0), (1, 1), (2, 1), (3,), (8, 1), (9,)]
    ),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
)
def test_it_gives_what_linear_gives(rows, width, out, bias):
    x, weight, added = operands(rows, width, out, bias=bias)
    got = MANY_ROW_LINEAR(x, weight, added).double()
    torch.testing.assert_close(got, linear_in_float64(x, weight, added), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_layout(bias):
    x, weight, added = operands((40, 2), 24, 24, bias=bias)
    for one, matrix in ((x.transpose(0, 1), weight), (x[::2], weight), (x, weight.T), (x[..., ::2], weight[:, ::2])):
        got = MANY_ROW_LINEAR(one, matrix, added).double()
        torch.testing.assert_close(got, linear_in_float64(one, matrix, added), rtol=1e-5, atol=1e-4)


def test_it_is_an_operation_as_torch_wants_them():
    for rows in ((2, 3), (2, 40)):
        torch.library.opcheck(
            MANY_ROW_LINEAR, operands(rows, 16, 24, bias=True), test_utils=("test_schema", "test_faketensor")
        )


def rewritten(function, values, *, dynamic=True):
    """Return how many products of ``function`` were rewritten, and what it returns then."""
    counts = []

    def backend(gm, _):
        counts.append(applied(UseManyRowLinear(), gm))
        assert applied(UseManyRowLinear(), gm) == 0
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        [result] = torch.compile(function, backend=backend, dynamic=dynamic)(*values)
    return *counts, result


def test_any_number_of_rows_is_rewritten():
    def mlp(x, up, down, bias):
        return (functional.linear(functional.linear(x, up).relu(), bias=bias, weight=down),)

    torch.manual_seed(0)
    values = torch.randn(2, 50, 8), weights(12, 8), weights(8, 12), weights(8)
    count, got = rewritten(mlp, values)
    assert count == 2
    torch.testing.assert_close(got.double(), *mlp(*(one.double() for one in values)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 8])
def test_a_batch_that_the_graph_counts_is_rewritten(batch):
    values = torch.randn(batch, 1, 8), weights(12, 8)
    count, got = rewritten(lambda x, w: (functional.linear(x, w),), values, dynamic=False)
    assert count == 1
    torch.testing.assert_close(got, functional.linear(*values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 31, 32])
def test_a_batch_is_multiplied_by_what_a_trial_of_as_many_rows_says(rows, faster, monkeypatch):
    asked = []
    monkeypatch.setattr(many_row_linear, "onednn_pays_for_batch", lambda threads, batch: asked.append(batch))
    MANY_ROW_LINEAR(torch.randn(rows, 1, 8), torch.randn(12, 8), None)
    assert asked == ([rows] if 2 <= rows <= 8 else [])


def test_a_trial_is_made_once_for_a_number_of_rows(monkeypatch):
    monkeypatch.undo()
    tried: list[tuple[int, ...]] = []
    monkeypatch.setattr(onednn, "pays", lambda name, plain, other, x, weight: tried.append(tuple(x.shape)) or True)
    many_row_linear.onednn_pays_for_batch.cache_clear()
    try:
        for rows in (2, 3, 2):
            MANY_ROW_LINEAR(torch.randn(rows, 8), torch.randn(12, 8), None)
    finally:
        many_row_linear.onednn_pays_for_batch.cache_clear()
    assert [shape[0] for shape in tried] == [2, 3]


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(1, 1, 8), weights(4, 8)),
        (torch.randn(1, 50, 8), weights(4, 8)),
        (torch.randn(50, 8).bfloat16(), weights(4, 8).bfloat16()),
        (torch.randn(50, 8, device="meta"), weights(4, 8).to("meta")),
    ],
    ids=["one row", "counted rows", "16 bits", "another device"],
)
def test_others_are_left_alone(x, weight):
    count, _ = rewritten(lambda x, w: (functional.linear(x, w),), (x, weight), dynamic=x.shape[0] > 1)
    assert count == 0


def test_under_autocast_nothing_is_rewritten():
    x, weight = torch.randn(2, 50, 8), weights(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        count, got = rewritten(lambda x, w: (functional.linear(x, w),), (x, weight))
    assert (count, got.dtype) == (0, torch.bfloat16)
