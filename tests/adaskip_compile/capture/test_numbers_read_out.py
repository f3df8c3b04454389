"""Models that read numbers out of tensors, which Dynamo captures where ``capture_scalar_outputs`` is set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.capture.dynamo import capture_count
from tests.models import tokens


def scaled_by_a_number(h: torch.Tensor) -> torch.Tensor:
    return h * h.abs().max().item()


def with_a_count(h: torch.Tensor) -> torch.Tensor:
    return h + (h[0, 0, :4] > 0).sum().item()


def with_a_size(h: torch.Tensor) -> torch.Tensor:
    size = int((h[0, 0, :4] > 0).sum().item())
    torch._check(size >= 0)
    torch._check(size <= 4)
    return h + torch.ones(64)[:size].sum()


def broken(h: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return h


class Block(nn.Module):
    def __init__(self, inside: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inside = inside
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.inside(torch.relu(self.up(self.norm(x)))))


class Decoder(nn.Module):
    """Blocks of FFNs, those at the positions in ``omitted`` left out for a scale; ``counted`` adds a number to the stream."""

    def __init__(self, inside: Callable[[torch.Tensor], torch.Tensor], counted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.counted = counted
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.blocks = nn.ModuleList(Block(inside) for _ in range(4))
        self.omitted: dict[int, float] = {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.counted:
            x = x + 0.01 * ids.max().item()
        for index, block in enumerate(self.blocks):
            x = self.omitted[index] * x if index in self.omitted else block(x)
        return self.head(x)


@torch.no_grad()
def run(model: Any) -> list[torch.Tensor]:
    return [model(tokens(1, length, vocabulary=60, seed=length)) for length in (7, 11)]


def eager(inside: Any, counted: bool, omitted: Mapping[int, float]) -> list[torch.Tensor]:
    model = Decoder(inside, counted).eval()
    model.omitted.update(omitted)
    return run(model)


SKIPS: list[dict[int, float]] = [{}, {1: 0.9}, {0: 0.8, 3: 1.1}]
CASES = [(scaled_by_a_number, False), (with_a_count, False), (with_a_size, False), (torch.neg, True)]


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("inside", "counted"), CASES)
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_sublayer_that_reads_numbers_out_is_skipped(inside: Any, counted: bool, inner: str):
    model = Decoder(inside, counted).eval()
    for omitted in SKIPS:
        plan = SkipPlan.from_scales({f"blocks.{index}": scale for index, scale in omitted.items()}, window=0)
        adaskip_compile.compile(model, plan, inner=inner)
        torch.testing.assert_close(run(model), eager(inside, counted, omitted))
    (session,) = adaskip_compile.report(model).sessions
    assert len(session.graphs) == 1
    assert not session.notes


def test_equal_layers_behind_a_graph_break_are_captured_once():
    expected = eager(broken, False, {})
    model = Decoder(broken).eval()
    model.compile(backend="adaskip", options={"inner": "eager"}, dynamic=True)
    before = capture_count()
    torch.testing.assert_close(run(model), expected)
    assert capture_count() - before == 2  # what stands before the break in each block, and what stands behind it
