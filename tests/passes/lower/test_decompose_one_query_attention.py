"""Attention of one query, spelled out: equal to PyTorch's own, in eager mode and as Inductor compiles it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adaskip_passes.ir.graph import fake_value
from adaskip_passes.lower.decompose_one_query_attention import DecomposeOneQueryAttention
from tests.captures import first_graph
from tests.rewriting import applied

HEADS, GROUPS, WIDTH, TOKENS = 6, 2, 16, 37


def inputs(batch: int = 1, queries: int = 1, groups: int = GROUPS, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, HEADS, queries, WIDTH), *((batch, groups, TOKENS, WIDTH),) * 2)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def masks(batch: int) -> dict[str, torch.Tensor | None]:
    allowed = torch.rand(batch, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.4
    added = torch.zeros(batch, HEADS, 1, TOKENS).masked_fill(~allowed.expand(batch, HEADS, 1, TOKENS), -1e9)
    nothing = allowed.clone()
    nothing[0] = False
    return {"none": None, "bool": allowed, "float for each head": added, "a row of nothing": nothing}


@pytest.mark.parametrize("name", ["none", "bool", "float for each head", "a row of nothing"])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_equals_the_kernel(batch, name):
    mask = masks(batch)[name]
    values = inputs(batch)
    gm = first_graph(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True), *values)
    given = [value for value in (*values, mask) if value is not None]
    order = [next(one for one in given if one.shape == fake_value(node).shape and one.dtype == fake_value(node).dtype)
             for node in gm.graph.find_nodes(op="placeholder")]  # fmt: skip
    [wanted] = gm(*_apart(order, values, mask))
    assert applied(DecomposeOneQueryAttention(), gm) == 1
    [got] = gm(*_apart(order, values, mask))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def _apart(order, values, mask):
    """Return the inputs in graph order: keys and values have one shape, and come in the order in which they are read."""
    left = [*values, *([] if mask is None else [mask])]
    found = []
    for like in order:
        place = next(i for i, one in enumerate(left) if one.shape == like.shape and one.dtype == like.dtype)
        found.append(left.pop(place))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_its_own_and_16_bits(dtype):
    values = inputs(groups=HEADS, dtype=dtype)
    gm = first_graph(lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.3), *values)
    [wanted] = gm(*values)
    assert applied(DecomposeOneQueryAttention(), gm) == 1
    [got] = gm(*values)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("how", [{"is_causal": True}, {"dropout_p": 0.1}])
def test_what_means_something_else_is_left_alone(how):
    values = inputs(groups=HEADS)
    gm = first_graph(lambda q, k, v: scaled_dot_product_attention(q, k, v, **how), *values)
    assert applied(DecomposeOneQueryAttention(), gm) == 0


def test_several_queries_are_left_to_the_kernel():
    values = inputs(queries=2, groups=HEADS)
    gm = first_graph(lambda q, k, v: scaled_dot_product_attention(q, k, v), *values)
    assert applied(DecomposeOneQueryAttention(), gm) == 0
