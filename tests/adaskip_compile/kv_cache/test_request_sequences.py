"""Random sequences of what may happen to many requests at once: each gives what it gives alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule, run_state_machine_as_test

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_compile.planning.skip_plan import RampStep
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from tests.generation import CACHES, make_cache
from tests.models import tiny, tokens
from tests.reference import omit_sublayers

SEQUENCES = 200
LAYERS = 3
HOLES: dict[str, dict[str, float]] = {
    "holes": {"model.layers.0.self_attn": 0.9, "model.layers.1.mlp": 1.1},
    "window": {"model.layers.1.self_attn": 1.05},
    "ramp": {"model.layers.2.self_attn": 0.95},
}
RAMP = ((2, "model.layers.0.self_attn", 0.8), (3, "model.layers.1.mlp", 1.2))


def plan(name: str) -> SkipPlan:
    made = SkipPlan.from_scales(HOLES[name], window=3)
    if name == "window":
        return replace(made, beta=-1.0)  # every FFN is added, by the scale that this request has measured
    if name == "ramp":
        steps = (RampStep(after, (SkippedSublayer(path, "", None, scale, None),)) for after, path, scale in RAMP)
        return replace(made, ramp=tuple(steps))
    return made


@dataclass(frozen=True)
class Models:
    """The model under test, one that runs each request alone, and an eager one that omits what ``omitted`` holds."""

    together: Any
    alone: Any
    eager: Any
    omitted: dict[str, float]


@dataclass
class Running:
    """A request: its plan, its cache, what has been done to it, and the logits that each call gave."""

    plan: str
    kind: str
    cache: Any
    rows: int
    done: list[tuple[str, Any]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def copied(self) -> Running:
        return replace(self, cache=copy.deepcopy(self.cache), done=list(self.done), logits=list(self.logits))


def call(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    seen = int(cache.get_seq_length())
    positions = torch.arange(seen, seen + ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model(ids, position_ids=positions, use_cache=True, **cache_argument(model, cache)).logits[:, -1]


def act(cache: Any, what: str, how: Any) -> None:
    """Do to ``cache`` what no call of the model does."""
    if what == "crop":
        cache.crop(how)
    elif what == "reorder":
        cache.reorder_cache(torch.tensor(how))
    else:
        cache.batch_select_indices(torch.tensor(how))


def replayed(models: Models, request: Running) -> list[torch.Tensor]:
    """Return the logits of the same request, run alone from its beginning.

    By the eager model, under a plan whose scales are known beforehand; by a compiled model of its own else.
    """
    model = models.alone if request.plan == "window" else models.eager
    adaskip_compile.compile(models.alone, plan(request.plan), inner="eager", keep_captures=False)
    cache = make_cache(request.kind, model)
    found: list[torch.Tensor] = []
    for what, how in request.done:
        if what != "call":
            act(cache, what, how)
            continue
        now = dict(HOLES[request.plan])
        if request.plan == "ramp":
            now |= {path: scale for after, path, scale in RAMP if after <= len(found) - 1}
        models.omitted.clear()
        models.omitted.update(now)
        found.append(call(model, cache, how))
    return found


class Requests(RuleBasedStateMachine):
    """Many requests of one model, begun under one of three plans each."""

    running = Bundle("running")

    models: Models

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Running] = []

    def switch_to(self, name: str) -> None:
        adaskip_compile.compile(self.models.together, plan(name), inner="eager", keep_captures=False)

    @rule(target=running, name=st.sampled_from([*HOLES]), kind=st.sampled_from(CACHES), rows=st.integers(1, 3))
    def begin(self, name: str, kind: str, rows: int) -> Running:
        """Begin a request under a plan that stays for those that begin after it."""
        self.switch_to(name)
        request = Running(name, kind, make_cache(kind, self.models.together, 48), rows)
        self.seen.append(request)
        self.call(request, tokens(rows, 6, seed=len(self.seen)))
        return request

    @rule(request=running, steps=st.integers(1, 3), seed=st.integers(0, 99))
    def step(self, request: Running, steps: int, seed: int) -> None:
        for ids in tokens(request.rows, steps, seed=seed).split(1, dim=1):
            self.call(request, ids)

    @rule(target=running, request=running)
    def copy(self, request: Running) -> Running:
        self.seen.append(request.copied())
        return self.seen[-1]

    @rule(request=running, removed=st.integers(1, 2))
    def crop(self, request: Running, removed: int) -> None:
        if request.kind == "dynamic" and request.cache.get_seq_length() > 4:
            self.act(request, "crop", -removed)

    @rule(request=running, by=st.integers(0, 2))
    def reorder(self, request: Running, by: int) -> None:
        self.act(request, "reorder", [(row + by) % request.rows for row in range(request.rows)])

    @rule(request=running, row=st.integers(0, 2))
    def select(self, request: Running, row: int) -> None:
        if request.kind == "dynamic" and request.rows > 1:
            rows = [row % request.rows, *range(request.rows - 2)]
            self.act(request, "select", rows)
            request.rows = len(rows)

    @rule(name=st.sampled_from([*HOLES]))
    def switch_plan(self, name: str) -> None:
        self.switch_to(name)

    @rule(request=consumes(running))
    def drop(self, request: Running) -> None:
        request.cache = None

    def call(self, request: Running, ids: torch.Tensor) -> None:
        request.logits.append(call(self.models.together, request.cache, ids))
        request.done.append(("call", ids))

    def act(self, request: Running, what: str, how: Any) -> None:
        act(request.cache, what, how)
        request.done.append((what, how))

    def teardown(self) -> None:
        """Compare each request, also those that were dropped."""
        for request in self.seen:
            for got, wanted in zip(request.logits, replayed(self.models, request), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def models() -> Any:
    """Captures are kept for the whole test: all sequences share them."""
    eager, omitted = tiny("llama", num_hidden_layers=LAYERS), dict[str, float]()
    with omit_sublayers(eager, omitted):
        together, alone = (tiny("llama", num_hidden_layers=LAYERS) for _ in range(2))
        yield Models(together, alone, eager, omitted)


def test_each_of_many_requests_gives_what_it_gives_alone(models: Models) -> None:
    about = settings(
        max_examples=SEQUENCES,
        stateful_step_count=12,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    machine = type("OfTheseModels", (Requests,), {"models": models})
    run_state_machine_as_test(machine, settings=about)
