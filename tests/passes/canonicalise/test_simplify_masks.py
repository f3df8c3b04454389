"""Masks that say no more than causality or a window go, and only those: against the same function uncompiled, and on whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.runtime.session import sessions_of
from adaskip_passes.canonicalise.simplify_masks import SimplifyMasks
from adaskip_passes.ir.graph import named_arguments
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION
from tests.captures import first_graph
from tests.generation import CACHES, generate, left_padded, make_cache
from tests.models import tiny, tokens
from tests.rewriting import applied

HEADS, GROUPS, WIDTH = 4, 2, 8


def repeated(x: torch.Tensor) -> torch.Tensor:
    batch, groups, length, width = x.shape
    wide = x[:, :, None, :, :].expand(batch, groups, HEADS // GROUPS, length, width)
    return wide.reshape(batch, HEADS, length, width)


def causal(queries: Any, keys: Any, past: Any = 0) -> torch.Tensor:
    q_at, k_at = torch.arange(queries) + past, torch.arange(keys) + 0
    allowed = k_at[None, None, None, :] <= q_at[None, None, :, None]
    return (torch.ones((), dtype=torch.bool) & allowed.to("cpu")).expand(1, -1, queries, keys)


def attention(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask, scale=0.3)


def prefill(q, k, v):
    return (attention(q, k, v, causal(q.shape[2], k.shape[2])),)


def longer_cache(q, k, v):
    return (attention(q, k, v, causal(q.shape[2], k.shape[2])),)


def decode(q, k, v):
    return (attention(q, k, v, causal(1, k.shape[2], k.shape[2] - 1)),)


def same_heads(q, k, v):
    mask = causal(q.shape[2], k.shape[2])
    return (functional.scaled_dot_product_attention(q, repeated(k) + 0, repeated(v), attn_mask=mask),)


def chunk(q, k, v):
    return (attention(q, k, v, causal(q.shape[2], k.shape[2], k.shape[2] - q.shape[2])),)


def within(window: int, queries: Any, keys: Any, past: Any = 0) -> torch.Tensor:
    q_at, k_at = torch.arange(queries) + past, torch.arange(keys)
    return causal(queries, keys, past) & (k_at[None, None, None, :] > q_at[None, None, :, None] - window)


def sliding(q, k, v):
    return (attention(q, k, v, within(3, q.shape[2], k.shape[2])),)


def wide(q, k, v):
    return (attention(q, k, v, within(130, q.shape[2], k.shape[2])),)


def far_behind(q, k, v):
    return (attention(q, k, v, within(3, q.shape[2], k.shape[2], -(q.shape[2] // 2))),)


def sliding_chunk(q, k, v):
    return (attention(q, k, v, within(3, q.shape[2], k.shape[2], k.shape[2] - q.shape[2])),)


def ahead(q, k, v):
    at = torch.arange(k.shape[2])
    near = (at[None, None, None, :] >= at[None, None, :, None]) & (
        at[None, None, None, :] < at[None, None, :, None] - 2
    )
    return (attention(q, k, v, near),)


def strictly(q, k, v):
    at = torch.arange(k.shape[2])
    return (attention(q, k, v, at[None, None, None, :] < at[None, None, :, None] + 2),)


def written_positions(q, k, v):
    at = torch.arange(k.shape[2])
    shifted = at + 0
    shifted.add_(2)
    return (attention(q, k, v, at[None, None, None, :] <= shifted[None, None, :, None]),)


def scaled_positions(q, k, v):
    at = torch.arange(k.shape[2])
    later = torch.add(at, at, alpha=0) + 0
    return (attention(q, k, v, at[None, None, None, :] <= torch.add(later, 1, alpha=3)[None, None, :, None]),)


def by_row(q, k, v):
    at, rows = torch.arange(k.shape[2]), torch.arange(q.shape[0])
    allowed = at[None, None, None, :] <= at[None, None, :, None] + rows[:, None, None, None]
    return (attention(q, k, v, allowed),)


def padded(q, k, v, mask):
    return (attention(q, k, v, causal(q.shape[2], k.shape[2]) & mask[:, None, None, :]),)


def inputs(queries: int, keys: int, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(queries + keys)
    shapes = (1, HEADS, queries, WIDTH), (1, GROUPS, keys, WIDTH), (1, GROUPS, keys, WIDTH)
    return (*(torch.randn(shape) for shape in shapes), *more)


def captured(function: Any, values: tuple[torch.Tensor, ...], *, fixed: bool = False) -> Any:
    for value in () if fixed else values:
        if value.dim() == 4 and value.shape[2] > 1:
            torch._dynamo.maybe_mark_dynamic(value, 2)
    return first_graph(function, *values)


def sdpa(gm: Any) -> dict[str, Any]:
    [node] = gm.graph.find_nodes(op="call_function", target=functional.scaled_dot_product_attention)
    return named_arguments(node, ("query", "key", "value"))


def band(gm: Any) -> tuple[Any, ...]:
    [node] = gm.graph.find_nodes(op="call_function", target=BANDED_ATTENTION)
    return node.args


def run(gm: Any, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Call ``gm`` with ``values``, ``q``, ``k`` and ``v``, and where it wants a size with that of the tensor that has it."""
    tensors = dict(zip(("l_q_", "l_k_", "l_v_"), values, strict=True))
    nodes = {node.name: node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")}
    sizes = {str(size): tensors[name].shape[dim] for name in tensors for dim, size in enumerate(nodes[name].shape)}
    return gm.forward(*(tensors.get(name, sizes.get(str(value))) for name, value in nodes.items()))[0]


@pytest.mark.parametrize(
    ("function", "sizes", "is_causal"),
    [
        (prefill, [(7, 7), (3, 3), (12, 12)], True),
        (longer_cache, [(5, 9), (3, 20), (7, 8)], True),
        (decode, [(1, 9), (1, 2), (1, 30)], False),
    ],
    ids=["prefill", "longer-cache", "decode"],
)
@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
def test_a_mask_that_causality_implies_goes(function, sizes, is_causal, fixed):
    gm = captured(function, inputs(*sizes[0]), fixed=fixed)
    assert applied(SimplifyMasks(), gm) == 1
    given = sdpa(gm)
    assert (given["attn_mask"], given["is_causal"], given["enable_gqa"], given["scale"]) == (None, is_causal, True, 0.3)
    assert "arange" not in print_graph(gm)
    assert "expand" not in print_graph(gm)
    for queries, keys in sizes[:1] if fixed else sizes:
        values = inputs(queries, keys)
        torch.testing.assert_close(run(gm, values), function(*values)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "sizes", "window"),
    [
        (sliding, [(7, 7), (2, 2), (3, 3), (400, 400)], 3),
        (wide, [(300, 300), (129, 129), (131, 131), (8, 8)], 130),
        (sliding, [(5, 9), (3, 20)], 3),
    ],
    ids=["prefill", "blocks", "longer-cache"],
)
@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
def test_a_window_becomes_a_band(function, sizes, window, fixed):
    gm = captured(function, inputs(*sizes[0]), fixed=fixed)
    assert applied(SimplifyMasks(), gm) == 1
    assert band(gm)[3:] == (0, window, 0.3)
    assert "arange" not in print_graph(gm)
    assert "expand" not in print_graph(gm)
    for queries, keys in sizes[:1] if fixed else sizes:
        values = inputs(queries, keys)
        torch.testing.assert_close(run(gm, values), function(*values)[0], rtol=1e-5, atol=1e-6)


def test_a_band_may_begin_where_the_graph_computes():
    gm = captured(far_behind, inputs(7, 7))
    assert applied(SimplifyMasks(), gm) == 1
    assert isinstance(band(gm)[3], torch.fx.Node)
    for length in (7, 4, 30):
        values = inputs(length, length)
        torch.testing.assert_close(run(gm, values), far_behind(*values)[0], rtol=1e-5, atol=1e-6)


def test_it_happens_once():
    gm = captured(prefill, inputs(7, 7))
    applied(SimplifyMasks(), gm)
    text = print_graph(gm)
    assert applied(SimplifyMasks(), gm) == 0
    assert print_graph(gm) == text


def test_keys_that_are_no_plain_copies_stay():
    gm = captured(same_heads, inputs(7, 7))
    assert applied(SimplifyMasks(), gm) == 1
    assert "enable_gqa" not in sdpa(gm)
    values = inputs(4, 4)
    torch.testing.assert_close(run(gm, values), same_heads(*values)[0], rtol=1e-5, atol=1e-6)


def test_a_copy_of_what_is_written_later_stays():
    def function(q, k, v):
        mask = causal(q.shape[2], k.shape[2])
        wide = repeated(k)
        k.mul_(2)
        return (functional.scaled_dot_product_attention(q, wide, repeated(v), attn_mask=mask),)

    gm = captured(function, inputs(7, 7))
    assert applied(SimplifyMasks(), gm) == 1
    assert "enable_gqa" not in sdpa(gm)
    values = inputs(4, 4)
    wanted = function(*(value.clone() for value in values))[0]
    torch.testing.assert_close(run(gm, values), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (chunk, inputs(3, 9)),
        (sliding_chunk, inputs(3, 9)),
        (ahead, inputs(7, 7)),
        (strictly, inputs(7, 7)),
        (written_positions, inputs(7, 7)),
        (scaled_positions, inputs(7, 7)),
        (by_row, tuple(torch.cat([value, value]) for value in inputs(7, 7))),
        (padded, inputs(7, 7, torch.ones(1, 7, dtype=torch.bool))),
        (lambda q, k, v, mask: (attention(q, k, v, mask),), inputs(7, 7, torch.ones(1, 1, 7, 7, dtype=torch.bool))),
    ],
    ids=["chunk", "sliding-chunk", "empty", "other-diagonal", "written", "alpha", "by-row", "padding", "given"],
)
def test_any_other_mask_stays(function, values):
    gm = captured(function, values)
    text = print_graph(gm)
    assert applied(SimplifyMasks(), gm) == 0
    assert print_graph(gm) == text


@pytest.fixture
def masks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers compute a mask wherever it is captured, as it does with earlier versions of torch."""
    from transformers import masking_utils

    ignored = masking_utils._ignore_causal_mask_sdpa

    def never_while_captured(*args: Any, **kwargs: Any) -> bool:
        return not torch.compiler.is_compiling() and ignored(*args, **kwargs)

    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", never_while_captured)


@pytest.mark.newest("older transformers hand a mask of ones on, which a graph cannot know")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("skipped", [{}, {"model.layers.0.self_attn": 0.95}], ids=["full", "skipping"])
def test_whole_requests_without_their_masks(masks_always, kind, skipped):
    model = tiny("llama", num_hidden_layers=3)
    row = tokens(1, 19)[0]
    requests = [left_padded([row]), left_padded([row, row[4:]])]
    plan = SkipPlan.from_scales(skipped)
    adaskip_compile.compile(model, plan, inner="eager", keep_captures=False)
    for request in requests:
        got = generate(model, *request, 12, cache=make_cache(kind, model))
        assert torch.equal(got, reference(model, request, skipped))
    graphs = [graph for session in sessions_of(model) for graph in session.graphs]
    masked = {
        graph.stream.phase: graph
        for graph in graphs
        if graph.gm.graph.find_nodes(op="call_function", target=functional.scaled_dot_product_attention)
        and "attn_mask=None" in print_graph(graph.gm)
    }
    assert masked.keys() == ({"prefill", "decode"} if kind == "dynamic" else {"prefill"})


@pytest.mark.newest("older transformers hand a mask of ones on, which a graph cannot know")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_whole_requests_within_a_window(inner):
    model = tiny("qwen3", num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    request = left_padded([tokens(1, 300)[0]])
    skipped = {"model.layers.2.self_attn": 0.95}
    adaskip_compile.compile(model, SkipPlan.from_scales(skipped), inner=inner, keep_captures=False)
    assert torch.equal(generate(model, *request, 12), reference(model, request, skipped))
    [prefill] = [graph for one in sessions_of(model) for graph in one.graphs if graph.stream.phase == "prefill"]
    calls = [node for node in prefill.gm.graph.nodes if node.target is BANDED_ATTENTION]
    assert len(calls) == 2  # of three attentions the first has no window


def reference(model: Any, request: tuple[torch.Tensor, torch.Tensor], skipped: dict[str, float]) -> torch.Tensor:
    from tests.reference import omit_sublayers

    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    with omit_sublayers(model, skipped):
        tokens_wanted = generate(model, *request, 12)
    model._compiled_call_impl = compiled
    return tokens_wanted
