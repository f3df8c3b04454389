"""Which attentions of a graph are handed to the operation that chooses as it runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION
from adaskip_passes.lower.use_banded_attention import UseBandedAttention
from tests.rewriting import applied


def inputs(groups=4, queries=50, keys=50, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    shapes = (2, 4, queries, 8), (2, groups, keys, 8), (2, groups, keys, 8)
    return tuple(torch.randn(shape).to(dtype).to(device) for shape in shapes)


def written_out(q, k, v, scale=None):
    q, k, v = q.double(), *(one.double().repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def rewritten(function, values, *, dynamic=True):
    """Return how many attentions of ``function`` were rewritten, and what it returns then."""
    counts = []

    def backend(gm, _):
        counts.append(applied(UseBandedAttention(), gm))
        assert [node.target for node in gm.graph.nodes].count(BANDED_ATTENTION) == counts[-1]
        return gm.forward

    torch._dynamo.reset()
    values = [one.clone() for one in values]  # marks stay on a tensor
    for one in values if dynamic else ():
        torch._dynamo.mark_dynamic(one, -2 % one.dim())
    with torch.no_grad():
        [result] = torch.compile(function, backend=backend)(*values)
    return *counts, result


@pytest.mark.parametrize(
    ("values", "how"),
    [
        (inputs(), {}),
        (inputs(groups=2), {"enable_gqa": True, "scale": 0.3}),
        (inputs(keys=70), {}),
        (inputs(keys=30), {}),
    ],
    ids=["as many keys", "groups", "more keys", "fewer keys"],
)
def test_causal_attention_of_a_prompt(values, how):
    def attend(q, k, v):
        return (functional.scaled_dot_product_attention(q, k, v, is_causal=True, **how),)

    count, got = rewritten(attend, values)
    assert count == 1
    torch.testing.assert_close(got.double(), written_out(*values, scale=how.get("scale")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "how", "dynamic"),
    [
        (inputs(), {}, True),
        (inputs(), {"attn_mask": torch.ones(1, 1) > 0}, True),
        (inputs(), {"is_causal": True}, False),
        (inputs(dtype=torch.bfloat16), {"is_causal": True}, True),
        (inputs(device="meta"), {"is_causal": True}, True),
        (tuple(one[0] for one in inputs()), {"is_causal": True}, True),
    ],
    ids=["not causal", "masked", "queries counted", "16 bits", "another device", "no batch"],
)
def test_others_are_left_alone(values, how, dynamic):
    def attend(q, k, v):
        return (functional.scaled_dot_product_attention(q, k, v, **how),)

    count, _ = rewritten(attend, values, dynamic=dynamic)
    assert count == 0


def test_under_autocast_nothing_is_rewritten():
    def attend(q, k, v):
        return (functional.scaled_dot_product_attention(q, k, v, is_causal=True),)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        count, got = rewritten(attend, inputs())
    assert (count, got.dtype) == (0, torch.bfloat16)
