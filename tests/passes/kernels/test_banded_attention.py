"""Attention within a band, against the formula written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaskip_passes.kernels import banded_attention as module
from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION, banded_attention

HEADS, WIDTH, VALUE_WIDTH = 4, 8, 6


@pytest.fixture(params=["products", "kernel"], autouse=True)
def way(request, monkeypatch):
    """Each way that a machine may find to be the faster one, whichever this one does; on blocks of any size."""
    monkeypatch.setattr(module, "_MANY", 1)
    monkeypatch.setattr(module, "_SCORES", 1 << 12)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 8)
    monkeypatch.setattr(module, "onednn_pays", lambda *_: request.param == "products")
    return request.param


def inputs(queries: int, keys: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = (2, HEADS, queries, WIDTH), (2, groups, keys, WIDTH), (2, groups, keys, VALUE_WIDTH)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def written_out(q, k, v, first, window, scale, sinks=0, tail=0):
    q, k, v = q.double(), *(one.double().repeat_interleave(HEADS // one.shape[1], 1) for one in (k, v))
    scores = q @ k.mT * (WIDTH**-0.5 if scale is None else scale)
    behind = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    wide = (torch.arange(k.shape[2]) < sinks) | (torch.arange(q.shape[2]) >= q.shape[2] - tail)[:, None]
    seen = (behind >= first) & ((behind < first + window) | wide)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0) @ v


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(1, 300),
    keys=st.integers(1, 300),
    groups=st.sampled_from([1, 2, 4]),
    first=st.integers(-200, 200),
    window=st.integers(1, 280),
    scale=st.sampled_from([None, 0.3]),
    sinks=st.sampled_from([0, 0, 1, 4]),
    tail=st.sampled_from([0, 0, 1, 16]),
)
def test_each_query_sees_its_band(queries, keys, groups, first, window, scale, sinks, tail):
    q, k, v = inputs(queries, keys, groups)
    got = banded_attention(q, k, v, first, window, scale, sinks, tail)
    wanted = written_out(q, k, v, first, window, scale, sinks, tail)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_it_is_an_operation_as_torch_wants_them():
    for sizes in ((9, 9), (200, 150), (300, 300)):
        torch.library.opcheck(BANDED_ATTENTION, (*inputs(*sizes, 2), 0, 140, None))
        torch.library.opcheck(BANDED_ATTENTION, (*inputs(*sizes, 2), 0, 40, None, 1, 16))


def test_half_precision_is_as_near_as_with_a_mask():
    q, k, v = inputs(300, 300, 2)
    got = banded_attention(*(one.bfloat16() for one in (q, k, v)), 0, 40, None)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), written_out(q, k, v, 0, 40, None), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("sinks", "tail"), [(0, 0), (1, 16)])
def test_gradients_are_those_of_the_formula(sinks: int, tail: int) -> None:
    q, k, v = (one.requires_grad_() for one in inputs(300, 300, 2))
    weights = torch.randn(2, HEADS, 300, VALUE_WIDTH, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((banded_attention(q, k, v, 0, 40, None, sinks, tail) * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((written_out(q, k, v, 0, 40, None, sinks, tail) * weights).sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
