"""Sublayers whose rows change places within are computed of the rows that are read, where that is proven to be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - it registers the product of groups
from torch import fx
from torch.nn import functional

from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name, size_hint
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.narrow_rows import NarrowRows
from adaskip_passes.specialise.needed_rows import stopped_at
from adaskip_passes.stream.stream import ResidualStream, Sublayer
from tests.captures import first_graph

WIDTH, EXPERTS, CHOSEN = 6, 4, 2
Branch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, WIDTH), (EXPERTS, WIDTH, WIDTH)
    router, experts = (torch.randn(shape, generator=generator) for shape in shapes)
    return router, experts


def choose(h: torch.Tensor, router: torch.Tensor, k: int = CHOSEN) -> tuple[torch.Tensor, torch.Tensor]:
    shares, ids = functional.linear(h, router).softmax(-1).topk(k, dim=-1)
    shares /= shares.sum(-1, keepdim=True)
    return shares, ids


def ends_of_groups(ids: torch.Tensor) -> torch.Tensor:
    counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    return torch.cumsum(counts, 0, dtype=torch.int32)


def grouped(x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, experts, offs=ends)


def sorted_by_expert(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor, k: int = CHOSEN, **how: Any) -> Any:
    """Return what each token's experts give, weighted and in the order of the experts, and the order."""
    h = x.reshape(-1, WIDTH)
    shares, ids = choose(h, router, k)
    ids_in_order, order = torch.sort(ids.reshape(-1), **how)
    y = grouped(h[order // k], experts, ends_of_groups(ids_in_order))
    return y * shares.reshape(-1)[order].unsqueeze(-1), order


def undone(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    y, order = sorted_by_expert(x, router, experts)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0))
    return y[inverse].view(-1, CHOSEN, WIDTH).sum(1).reshape(x.shape)


def undone_by_argsort(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    y, order = sorted_by_expert(x, router, experts)
    return y[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).reshape(x.shape)


def added_in_place(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    y, order = sorted_by_expert(x, router, experts)
    out = torch.zeros(x.shape[0] * x.shape[1], WIDTH)
    out.index_add_(0, order // CHOSEN, y)
    return out.view(x.shape)


def one_expert_a_token(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    y, order = sorted_by_expert(x, router, experts, 1)
    return torch.zeros_like(x.reshape(-1, WIDTH)).index_add(0, order, y).view(x.shape)


def gathered_weights(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    h = x.reshape(-1, WIDTH)
    shares, ids = choose(h, router)
    rows = h.repeat_interleave(CHOSEN, dim=0)
    y = torch.bmm(rows.unsqueeze(1), experts[ids.reshape(-1)]).squeeze(1)
    return (y * shares.reshape(-1).unsqueeze(-1)).view(-1, CHOSEN, WIDTH).sum(1).view(x.shape)


def limited_groups(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Choose among the experts of the best group alone."""
    h = x.reshape(-1, WIDTH)
    scores = functional.linear(h, router).sigmoid()
    best = scores.view(-1, 2, EXPERTS // 2).sum(-1)
    mask = torch.zeros_like(best)
    mask.scatter_(1, best.topk(1, dim=-1).indices, 1)
    mask = mask.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(-1, EXPERTS)
    ids = scores.masked_fill(~mask.bool(), 0.0).topk(CHOSEN, dim=-1).indices
    shares = scores.gather(1, ids)
    y = torch.stack([h @ expert for expert in experts], 1)
    chosen = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, WIDTH))
    return (chosen * shares.unsqueeze(-1)).sum(1).view(x.shape)


def two_choices(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Choose the best expert, then the best of the others."""
    h = x.reshape(-1, WIDTH)
    scores = functional.linear(h, router)
    first = scores.max(-1, keepdim=True)
    second = scores.scatter(-1, first.indices, float("-inf")).max(-1, keepdim=True)
    ids = torch.concat((first.indices, second.indices), -1).reshape(-1)
    shares = torch.concat((first.values, second.values), -1).reshape(-1)
    ids, order = torch.sort(ids)
    y = grouped(h[order // CHOSEN], experts, ends_of_groups(ids)) * shares[order].unsqueeze(-1)
    return y[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).view(x.shape)


PROVEN = [undone, undone_by_argsort, added_in_place, one_expert_a_token, gathered_weights, limited_groups, two_choices]


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed sizes", "open sizes"])
@pytest.mark.parametrize("branch", PROVEN)
def test_experts_run_for_the_rows_that_are_read(branch: Branch, dynamic: bool) -> None:
    x = torch.randn(2, 11, WIDTH)
    gm, stream = one_sublayer(branch, x, dynamic)
    result = run_pipeline(gm, stream, (NarrowRows(2), EliminateDeadCode()))
    torch.testing.assert_close(called(result.gm, x), called(gm, x), rtol=2e-5, atol=2e-5)
    assert stopped_at(result.gm, result.stream, 2) == ()
    assert large_results(gm, 22)
    assert large_results(result.gm, 22) == []


def capacity(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Each expert takes three tokens, the first that choose it."""
    h = x.reshape(-1, WIDTH)
    shares, ids = choose(h, router, 1)
    chosen = (ids == torch.arange(EXPERTS)).float()
    taken = chosen * (chosen.cumsum(0) <= 3)
    y = torch.stack([h @ expert for expert in experts], 1)
    return ((taken * shares).unsqueeze(-1) * y).sum(1).view(x.shape)


def mean_over_tokens(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    h = x.reshape(-1, WIDTH)
    scores = functional.linear(h, router)
    return (scores / scores.abs().mean(0) @ router).view(x.shape)


def shifted(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    before = torch.cat((x[:, :1], x[:, :-1]), 1).reshape(-1, WIDTH)
    return functional.linear(before, experts[0]).view(x.shape)


def places(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    h = x.reshape(-1, WIDTH)
    return (h * torch.arange(h.shape[0])[:, None]).view(x.shape)


def loads(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Weigh each expert by how many tokens chose it."""
    h = x.reshape(-1, WIDTH)
    _, ids = choose(h, router, 1)
    load = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    return (h * load[ids.reshape(-1)].unsqueeze(-1)).view(x.shape)


def order_kept(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    y, _ = sorted_by_expert(x, router, experts)
    return y.view(-1, CHOSEN, WIDTH).sum(1).reshape(x.shape)


def order_taken_twice(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    y, order = sorted_by_expert(x, router, experts)
    return y[order].view(-1, CHOSEN, WIDTH).sum(1).reshape(x.shape)


def descending(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """The groups lie in the order of the experts, the rows in the opposite one."""
    y, order = sorted_by_expert(x, router, experts, descending=True)
    return y[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).reshape(x.shape)


def descending_by_position(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    h = x.reshape(-1, WIDTH)
    ids, order = torch.sort(choose(h, router)[1].reshape(-1), 0, True)
    y = grouped(h[order // CHOSEN], experts, ends_of_groups(ids))
    return y[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).view(x.shape)


def another_order_undone(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    y, _ = sorted_by_expert(x, router, experts)
    _, order = torch.sort(choose(-x.reshape(-1, WIDTH), router)[1].reshape(-1))
    return y[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).view(x.shape)


def best_tokens(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Each expert chooses three tokens."""
    h = x.reshape(-1, WIDTH)
    shares, chosen = functional.linear(h, router).softmax(-1).transpose(0, 1).topk(3, dim=-1)
    y = torch.bmm(h[chosen], experts) * shares.unsqueeze(-1)
    return torch.zeros_like(h).index_add(0, chosen.reshape(-1), y.reshape(-1, WIDTH)).view(x.shape)


def another_precision(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """A scope that ends before the result: a copy beside that would be outside of it."""
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.linear(x.reshape(-1, WIDTH), experts[0])
    return y.float().view(x.shape)


def groups_of_another_choice(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    h = x.reshape(-1, WIDTH)
    _, order = torch.sort(choose(h, router)[1].reshape(-1))
    ends = ends_of_groups(choose(-h, router)[1])
    return grouped(h[order // CHOSEN], experts, ends)[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).view(x.shape)


def coarse_groups(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Experts share bins, so that their rows do not end where the groups do."""
    h = x.reshape(-1, WIDTH)
    ids, order = torch.sort(choose(h, router)[1].reshape(-1))
    counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=9)
    y = grouped(h[order // CHOSEN], experts, counts.cumsum(0, dtype=torch.int32))
    return y[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).view(x.shape)


def view_before_a_write(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    h = functional.linear(x.reshape(-1, WIDTH), experts[0])
    half = h[:, :3]
    h.mul_(2)
    return torch.cat((half, half), -1).view(x.shape)


def numbers_changed(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    h = x.reshape(-1, WIDTH)
    ids, order = torch.sort(choose(h, router)[1].reshape(-1))
    ids.clamp_(max=1)
    y = grouped(h[order // CHOSEN], experts, ends_of_groups(ids))
    return y[torch.argsort(order)].view(-1, CHOSEN, WIDTH).sum(1).view(x.shape)


REFUSED: dict[Any, str] = {
    capacity: "cumsum",
    mean_over_tokens: "mean",
    shifted: "getitem",
    places: "mul",
    loads: "getitem",
    order_kept: "view",
    order_taken_twice: "getitem",
    descending: "sort",
    descending_by_position: "sort",
    another_order_undone: "getitem",
    best_tokens: "topk",
    another_precision: "_exit_autocast",
    groups_of_another_choice: "grouped_mm_fallback",
    coarse_groups: "histc",
    view_before_a_write: "getitem",
    numbers_changed: "clamp_",
}


OTHER_NAME = pytest.mark.newest("before, Dynamo captures == as a method, at which the analysis stops first")


@pytest.mark.parametrize("branch", [pytest.param(one, marks=OTHER_NAME) if one is capacity else one for one in REFUSED])
def test_what_mixes_tokens_is_computed_whole_and_told(branch: Branch) -> None:
    x = torch.randn(2, 11, WIDTH)
    gm, stream = one_sublayer(branch, x, False)
    result = run_pipeline(gm, stream, (NarrowRows(2), EliminateDeadCode()))
    torch.testing.assert_close(called(result.gm, x), called(gm, x), rtol=2e-5, atol=2e-5)
    assert stopped_at(result.gm, result.stream, 2) == (("ffn", REFUSED[branch]),)
    assert large_results(result.gm, 22), "it is computed of all rows"


def test_sizes_that_cannot_be_told_apart_are_left_alone() -> None:
    """As many prompts as tokens in each: which of two equal numbers follows the rows is not guessed."""
    x = torch.randn(11, 11, WIDTH)
    gm, stream = one_sublayer(undone, x, False)
    result = run_pipeline(gm, stream, (NarrowRows(2), EliminateDeadCode()))
    torch.testing.assert_close(called(result.gm, x), called(gm, x), rtol=2e-5, atol=2e-5)
    assert stopped_at(result.gm, result.stream, 2) == (("ffn", "reshape"),)


def test_a_stateful_sublayer_is_computed_whole() -> None:
    x = torch.randn(2, 11, WIDTH)
    gm, stream = one_sublayer(undone, x, False, stateful=True)
    result = run_pipeline(gm, stream, (NarrowRows(2), EliminateDeadCode()))
    assert large_results(result.gm, 22)


@pytest.mark.parametrize("stateful", [False, True])
def test_what_ends_the_sublayer_in_place_is_run_once(stateful: bool) -> None:
    def function(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f = x @ experts[0]
        f += x
        return (f[:, -2:],)

    x = torch.randn(2, 11, WIDTH)
    gm = first_graph(function, x, *weights())
    nodes = tuple(node for node in gm.graph.nodes if node.op.startswith("call"))
    [ends] = [node for node in nodes if op_name(node) in ("iadd", "__iadd__", "add_")]
    [source] = [node for node in ends.all_input_nodes if node.op == "placeholder"]
    stream = ResidualStream((Sublayer(0, "ffn", "ffn", stateful, source, ends, ends, nodes[: nodes.index(ends) + 1]),))
    result = run_pipeline(gm, stream, (NarrowRows(2), EliminateDeadCode()))
    _, experts = weights()
    torch.testing.assert_close(called(result.gm, x)[0], (x @ experts[0] + x)[:, -2:], rtol=2e-5, atol=2e-5)


def one_sublayer(
    branch: Branch, x: torch.Tensor, dynamic: bool, *, stateful: bool = False
) -> tuple[fx.GraphModule, ResidualStream]:
    """Capture the last two rows of ``x`` with ``branch`` added, and the stream of this one sublayer."""

    def function(x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((x + branch(x, router, experts))[:, -2:],)

    gm = first_graph(function, x, *weights(), dynamic=dynamic)
    [(rows,)] = gm.graph.output_node().args  # type: ignore[misc]
    assert isinstance(rows, fx.Node)
    add = rows.args[0]
    assert isinstance(add, fx.Node)
    source, added = add.all_input_nodes
    nodes = tuple(node for node in gm.graph.nodes if node.op.startswith("call") and node is not rows)
    return gm, ResidualStream((Sublayer(0, "ffn", "ffn", stateful, source, add, added, nodes),))


def called(gm: fx.GraphModule, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Call a graph that :func:`one_sublayer` captured."""
    router, experts = weights()
    given = {"x": x, "router": router, "experts": experts}
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        name = node.name.strip("_").split("_")[-1]
        inputs.append(given[name] if name in given else size_hint(fake_value(node)))
    return gm(*inputs)


def large_results(gm: fx.GraphModule, rows: int) -> list[str]:
    """Return the operations on numbers of ``rows`` or more rows, the sum of the stream and its rows aside."""
    found: list[str] = []
    for node in _computed(gm):
        value = fake_tensor(node)
        if value is not None and value.dim() and size_hint(value.shape[0]) >= rows:
            found.append(op_name(node))
    return found


def _computed(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in gm.graph.nodes if node.op in ("call_function", "call_method"))
