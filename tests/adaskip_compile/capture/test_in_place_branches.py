"""Branches that are written in place before the stream takes them, as tensor parallelism sums them over its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.runtime.session import sessions_of
from adaskip_passes.ir.graph import op_name
from tests.models import tokens
from tests.reference import reference_backend

pytestmark = pytest.mark.shares_captures

Scales = Mapping[str, float]


def copied(y: torch.Tensor) -> None:
    y.copy_(1.5 * y)


def multiplied(y: torch.Tensor) -> None:
    y.mul_(1.5).add_(0.25)


def through_a_view(y: torch.Tensor) -> None:
    y.view(-1).mul_(1.5)


def in_part(y: torch.Tensor) -> None:
    y[..., :16].mul_(1.5)


def reduced(y: torch.Tensor) -> None:
    distributed.all_reduce(y)


WRITES = [copied, multiplied, through_a_view, in_part, reduced]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.out(mixed.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """A block whose parts' results are written in place by ``write``; ``omitted`` holds scales of parts to leave out."""

    def __init__(self, write: Callable[[torch.Tensor], None], parallel: bool) -> None:
        super().__init__()
        self.write, self.parallel = write, parallel
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = Attention()
        self.ffn = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor, past: Any, omitted: Scales) -> tuple[torch.Tensor, Any]:
        attended, cache = self.attention(self.norm1(x), past)
        self.write(attended)
        if self.parallel and not omitted:
            fed = self.ffn(self.norm2(x))
            self.write(fed)
            return x + (attended + fed), cache
        inner = x
        x = omitted["attention"] * x if "attention" in omitted else x + attended
        fed = self.ffn(self.norm2(inner if self.parallel else x))
        self.write(fed)
        return omitted["ffn"] * x if "ffn" in omitted else x + fed, cache


class Decoder(nn.Module):
    def __init__(self, write: Callable[[torch.Tensor], None], parallel: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.blocks = nn.ModuleList(Block(write, parallel) for _ in range(3))
        self.omitted: dict[int, dict[str, float]] = {}

    def forward(self, ids: torch.Tensor, past: Any = (None, None, None)) -> tuple[torch.Tensor, Any]:
        caches: list[Any] = []
        x = self.embed(ids)
        for index, block in enumerate(self.blocks):
            x, cache = block(x, past[index], self.omitted.get(index, {}))
            caches.append(cache)
        return self.head(x), tuple(caches)


SKIPS: list[Scales] = [
    {},
    {"blocks.1.attention": 0.9},
    {"blocks.1.ffn": 0.8},
    {"blocks.0.attention": 0.9, "blocks.2.attention": 1.1, "blocks.2.ffn": 0.8},
]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@torch.no_grad()
def run(model: Any) -> list[torch.Tensor]:
    """Return the logits of a prompt and of two decoded tokens."""
    logits, cache = model(tokens(1, 9, vocabulary=60))
    found = [logits]
    for step in range(2):
        logits, cache = model(tokens(1, 1, vocabulary=60, seed=step), cache)
        found.append(logits)
    return found


def eager(write: Any, parallel: bool, scales: Scales) -> list[torch.Tensor]:
    model = Decoder(write, parallel).eval()
    for path, scale in scales.items():
        _, index, part = path.split(".")
        model.omitted.setdefault(int(index), {})[part] = scale
    return run(model)


CASES = [*((write, False) for write in WRITES), (copied, True), (reduced, True)]


@pytest.mark.parametrize(("write", "parallel"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_branch_that_is_written_in_place_is_skipped(write: Any, parallel: bool):
    now: dict[str, float] = {}
    reference, model = Decoder(write, parallel).eval(), Decoder(write, parallel).eval()
    reference.compile(backend=reference_backend(now), dynamic=True)
    for scales in SKIPS:
        expected = eager(write, parallel, scales)
        now.clear()
        now.update(scales)
        torch.testing.assert_close(run(reference), expected)
        adaskip_compile.compile(model, SkipPlan.from_scales(dict(scales), window=0), inner="eager")
        torch.testing.assert_close(run(model), expected)
        assert adaskip_compile.report(model).requests[-1].skipped == scales
    assert {graph.phase for graph in adaskip_compile.report(model).sessions[0].graphs} == {"prefill", "decode"}


@pytest.mark.slow
def test_inductor_keeps_the_order_of_reads_and_writes():
    scales = SKIPS[3]
    model = Decoder(reduced, parallel=False).eval()
    adaskip_compile.compile(model, SkipPlan.from_scales(dict(scales), window=0))
    torch.testing.assert_close(run(model), eager(reduced, False, scales))


@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_left_of_a_skipped_branch(write: Any):
    model = Decoder(write, parallel=False).eval()
    adaskip_compile.compile(
        model, SkipPlan.from_scales({"blocks.1.ffn": 0.8}, window=0), inner="eager", regions="whole"
    )
    run(model)
    (graph, *_) = sessions_of(model)[0].graphs
    history = next(iter(graph.variants.values())).history
    before = [op_name(node) for node in graph.gm.graph.nodes if node.op == "call_function"].count("linear")
    assert before == 13
    assert history[-1].nodes_before - history[-1].nodes_after >= 5
