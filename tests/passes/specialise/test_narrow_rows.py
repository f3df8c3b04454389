"""Only the rows that are read are computed, and they are what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from adaskip_passes.analysis.flops import count_flops
from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name, size_hint
from adaskip_passes.pipeline.pipeline import PipelineResult, run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.narrow_rows import NarrowRows
from adaskip_passes.specialise.needed_rows import stopped_at
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream
from tests.captures import first_graph, run, shared_captures, stream_of
from tests.models import FAMILIES, capture, capture_all, tiny
from tests.rewriting import applied

W = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
HEADS = (2, 3)

# Functions of x (batch, rows, 6), and the operation at which narrowing stops in each; none where all of it is narrowed.
FUNCTIONS: dict[str, tuple[Any, str | None]] = {
    "linear": (lambda x: functional.linear(functional.silu(functional.linear(x, W)), W, W[0]), None),
    "norms": (lambda x: functional.rms_norm(functional.layer_norm(x, (6,)), (6,)), None),
    "norm by hand": (
        lambda x: W[0] * (x.float() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
        None,
    ),
    "heads": (lambda x: x.view(*x.shape[:2], *HEADS).transpose(1, 2).permute(0, 2, 1, 3).reshape(*x.shape), None),
    "sum that drops a dimension": (lambda x: x.view(*x.shape[:2], *HEADS).sum(2).unsqueeze(-1), None),
    "halves": (lambda x: torch.cat((-x[..., 3:], x[..., :3]), dim=-1), None),
    "chunks": (lambda x: torch.sub(*functional.linear(x, W).chunk(2, dim=-1)), None),
    "stack": (lambda x: torch.stack([x, 2 * x], 1).mean(1), None),
    "gate": (
        lambda x: torch.where(x > 0, x, 0.5) * x.softmax(-1).topk(2, dim=-1).values.sum(-1, True),
        None,
    ),
    "the larger and the smaller of two": (
        lambda x: torch.max(torch.min(x, W[0, 0]), 2 * x).max(dim=-1, keepdim=True).values,
        None,
    ),
    "products that are rows": (lambda x: (x.unsqueeze(-2) @ (2 * x).unsqueeze(-1)).squeeze(-1), None),
    "order in a row": (lambda x: x.sort(-1, descending=True).values + x.argsort(-1), None),
    "read by position": (lambda x: x.gather(-1, x.argsort(-1)[..., :2]), None),
    "written by position": (lambda x: torch.zeros_like(x).scatter(-1, x.argsort(-1), 2 * x), "zeros_like"),
    "random numbers": (lambda x: functional.dropout(2 * x, 1.0, True), "dropout"),
    "broadcast": (lambda x: x + torch.arange(x.shape[1])[:, None] * 2.0, None),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 2, -1).flatten(2), None),
    "causal attention": (lambda x: functional.scaled_dot_product_attention(x, 2 * x, 3 * x, is_causal=True), None),
    "attention in full": (lambda x: functional.scaled_dot_product_attention(x, 2 * x, 3 * x), None),
    "masked attention": (
        lambda x: functional.scaled_dot_product_attention(
            x, 2 * x, 3 * x, attn_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(1)
        ),
        None,
    ),
    "attention by hand": (lambda x: (x @ (2 * x).transpose(1, 2)).softmax(-1) @ (3 * x), None),
    "rows that mix": (lambda x: functional.linear(x, W).cumsum(1), "cumsum"),
    "order of rows": (lambda x: (2 * x).sort(1).values, "sort"),
    "products of columns": (lambda x: (2 * x).transpose(1, 2) @ x[0, :, 0], "matmul"),
    "softmax over rows": (lambda x: (2 * x).softmax(1), "softmax"),
    "mean over rows": (lambda x: x * (2 * x).mean(1, keepdim=True), None),
    "flattened batch": (lambda x: functional.linear(x.view(-1, 6), W).view(*x.shape), "view"),
}


def narrowed(gm: fx.GraphModule, longest: int = 4) -> fx.GraphModule:
    result = run_pipeline(gm, ResidualStream(()), (NarrowRows(longest), EliminateDeadCode()))
    return result.gm


def called(gm: fx.GraphModule, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Call a graph of functions of this file; Dynamo makes an input of ``W`` too, in an order of its own."""
    tensors["w"] = W
    return gm(*[tensors[node.name.lower().strip("_").split("_")[-1]] for node in gm.graph.find_nodes(op="placeholder")])


def rows_computed(gm: fx.GraphModule, rows: int) -> list[str]:
    """Return the operations of ``gm`` that compute ``rows`` rows or more."""
    floats = [(node, fake_tensor(node)) for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
    found = [node for node, value in floats if value is not None and value.dim() == 3 and value.shape[1] == rows]
    return [op_name(node) for node in found]


@pytest.mark.parametrize("cut", [slice(-1, None), slice(-3, None), slice(None, 2)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_are_what_they_were(name: str, cut: slice) -> None:
    function, stop = FUNCTIONS[name]
    x = torch.randn(2, 9, 6)
    gm = first_graph(lambda x: (function(x)[:, cut],), x)
    result = narrowed(gm)
    [got], [wanted] = called(result, x=x), called(gm, x=x)
    torch.testing.assert_close(got, wanted)
    if stop is None and "attention" not in name and name != "mean over rows":
        assert not rows_computed(result, 9), name
    if stop is not None:
        assert stop in [op_name(node) for node in result.graph.nodes]


def test_first_and_last_rows_together() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.scaled_dot_product_attention(functional.linear(x, W), x, x, is_causal=True)
        return y[:, :1], y[:, -2:]

    x = torch.randn(1, 9, 6)
    gm = first_graph(function, x)
    result = narrowed(gm)
    torch.testing.assert_close(called(result, x=x), called(gm, x=x))
    [attention] = [node for node in result.graph.nodes if op_name(node) == "scaled_dot_product_attention"]
    assert tuple(fake_tensor(attention).shape) == (1, 3, 6)  # type: ignore[union-attr]


def test_what_is_read_whole_too_is_not_computed_twice() -> None:
    gm = first_graph(
        lambda x: (functional.linear(x, W)[:, -1:] * 2, functional.linear(x, W).sum()), torch.randn(1, 9, 6)
    )

    def shared(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.linear(x, W)
        return (y * 3)[:, -1:], y.sum()

    merged = first_graph(shared, torch.randn(1, 9, 6))
    assert sum(op_name(node) == "linear" for node in narrowed(merged).graph.nodes) == 1
    assert sum(op_name(node) == "linear" for node in narrowed(gm).graph.nodes) == 2


def test_what_is_written_is_left_alone() -> None:
    def function(x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.linear(x, W)
        y.mul_(2)
        memory.copy_(y)
        return ((y + 1)[:, -1:],)

    x, memory = torch.randn(1, 9, 6), torch.zeros(1, 9, 6)
    gm = first_graph(function, x, memory)
    result = narrowed(gm)
    [got] = called(result, x=x, memory=memory)
    filled = memory.clone()
    [wanted] = called(gm, x=x, memory=memory)
    torch.testing.assert_close((got, filled), (wanted, memory))


def test_more_rows_than_every_call_has_are_not_taken() -> None:
    gm = first_graph(lambda x: (functional.linear(x, W)[:, -3:],), torch.randn(1, 9, 6))
    assert narrowed(gm, longest=2).graph.find_nodes(op="call_function", target=functional.linear)
    assert rows_computed(narrowed(gm, longest=2), 9) == ["linear"]


NARROWED = [family for family in FAMILIES if family != "mamba"]
MIXTURES = ["mixtral", "qwen3_moe", "olmoe"]
ROWS_OF_EXPERTS = pytest.mark.newest(
    "before, experts of a mixture run for all rows of a prompt, and the report names the operation"
)


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=ROWS_OF_EXPERTS) if one in MIXTURES else one for one in NARROWED],
)
def test_the_last_layer_runs_for_the_last_row(family: str) -> None:
    """generate() reads the logits of the last token: of the last layer nothing else is computed but keys and values."""
    with torch._dynamo.config.patch(specialize_float=True):
        captured, _ = capture(tiny(family), length=20)
    applied(StraightenStream(), captured.gm)
    stream = find_residual_stream(captured.gm)
    result = run_pipeline(captured.gm, stream, (NarrowRows(), EliminateDeadCode()))
    for got, wanted in zip(
        run(result.gm.forward, captured).outputs, run(captured.gm.forward, captured).outputs, strict=True
    ):
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    last = [fake_tensor(one.stream_out) for one in result.stream.sublayers[-2:]]
    # OPT flattens its rows.
    assert [value.shape[-2] for value in last if value is not None] == [1, 1]
    assert stopped_at(result.gm, result.stream, 1) == ()


@ROWS_OF_EXPERTS
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_run_for_the_edges_of_a_prompt(family: str, batch: int) -> None:
    """Of a body that skips a mixture of experts, and of the last layer, no more is computed than the rows that are read."""
    with torch._dynamo.config.patch(specialize_float=True):
        captured = capture_all(tiny(family), batch=batch, length=20)[0]
    applied(StraightenStream(), captured.gm)
    stream = find_residual_stream(captured.gm)
    first, last = (path for path in stream.paths if path.endswith("mlp"))
    scales = torch.full((len(stream.paths),), 0.9)
    skip = SkipBodyRows((first,), head=1, tail=2)
    whole = run_pipeline(captured.gm, stream, (skip,))
    result = run_pipeline(captured.gm, stream, (skip, NarrowRows(2), EliminateDeadCode()))
    got, wanted = (run(one.gm.forward, captured, scales).outputs for one in (result, whole))
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    assert stopped_at(result.gm, result.stream, 3) == ()
    for path, rows in ((first, 3), (last, 1)):
        assert flops(result, path) * 20 == flops(whole, path) * rows > 0


def flops(result: PipelineResult, path: str) -> int:
    """Return the floating-point operations of a sublayer in the call that was captured."""
    open_sizes = [fake_value(node) for node in result.gm.graph.find_nodes(op="placeholder")]
    sizes = {size.node.expr: size_hint(size) for size in open_sizes if isinstance(size, torch.SymInt)}
    return sum(int(count_flops(node).subs(sizes)) for node in result.stream.by_path(path).nodes)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_hole_where_only_the_last_row_is_read(cache: str) -> None:
    captured = next(one for one in reversed(shared_captures("llama", cache)) if one.phase == "prefill")
    stream = stream_of(captured.gm)
    for path in stream.paths[-2:]:
        narrow = (NarrowRows(), EliminateDeadCode(), SkipSublayers((path,)), EliminateDeadCode())
        whole = (SkipSublayers((path,)), EliminateDeadCode())
        scales = torch.full((len(stream.paths),), 0.9)
        got, wanted = (
            run(run_pipeline(captured.gm, stream, passes).gm.forward, captured, scales) for passes in (narrow, whole)
        )
        torch.testing.assert_close(got.outputs, wanted.outputs, rtol=1e-5, atol=1e-5)


def test_what_is_narrowed_is_not_probed() -> None:
    captured = next(one for one in shared_captures("llama") if one.phase == "prefill")
    stream = stream_of(captured.gm)
    with pytest.raises(PassError, match="only some of its rows are computed; probe before narrow-rows"):
        run_pipeline(captured.gm, stream, (NarrowRows(), InsertProbes(stream.paths[-2:-1])))


def test_a_body_is_skipped_once_and_never_with_probes() -> None:
    captured = next(one for one in shared_captures("llama") if one.phase == "prefill")
    stream = stream_of(captured.gm)
    path = stream.paths[-2]
    twice = run_pipeline(
        captured.gm, stream, (SkipBodyRows((path,), head=1, tail=2), SkipBodyRows((path,), head=1, tail=2))
    )
    assert [record.matched for record in twice.history] == [1, 0]
    with pytest.raises(PassError, match=f"cannot skip the body rows of {path}: it is skipped or probed"):
        run_pipeline(captured.gm, stream, (InsertProbes((path,)), SkipBodyRows((path,))))


def test_the_narrowing_is_needed() -> None:
    """Of what the body skips, no more is computed than its edges: a slice alone would still compute every row."""
    captured = next(one for one in shared_captures("llama") if one.phase == "prefill")
    stream = stream_of(captured.gm)
    path = next(path for path in stream.paths if path.endswith("1.mlp"))
    result = run_pipeline(
        captured.gm, stream, (SkipBodyRows((path,), head=1, tail=2), NarrowRows(2), EliminateDeadCode())
    )
    nodes = result.stream.by_path(path).nodes
    products = [fake_tensor(node) for node in nodes if op_name(node) == "linear"]
    assert [value.shape[1] for value in products if value is not None] == [3, 3, 3]
    assert isinstance(result.gm, nn.Module)
