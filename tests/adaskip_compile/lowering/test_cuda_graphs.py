"""When a decode step is recorded and when it may be replayed; the device is stood for by calls on the same memory."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.lowering import cuda_graphs
from adaskip_compile.lowering.cuda_graphs import RecordedRun, recordable
from adaskip_compile.runtime import variants
from adaskip_passes.analysis.effects import positions_written
from tests.captures import first_graph
from tests.generation import generate, left_padded, make_cache
from tests.models import tiny, tokens

WEIGHT, CACHE, TOKEN = range(3)


def step(weight: torch.Tensor, cache: torch.Tensor, token: torch.Tensor) -> tuple[Any, ...]:
    """Add a token to the cache in place; return its sum with the weight, and the cache."""
    cache.add_(token)
    return cache.sum() + weight, cache, 3


class Device:
    """Stands for CUDA graphs: a replay runs the call again on the memory that it was recorded with, results too."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, run: Any, values: Any) -> tuple[Any, Any]:
        self.recorded += 1
        kept = [value.detach() if isinstance(value, torch.Tensor) else value for value in values]  # addresses
        before = [(value, value.clone()) for value in kept if isinstance(value, torch.Tensor)]
        outputs = run(*values)
        for value, old in before:
            value.copy_(old)  # recording runs nothing

        def replay() -> None:
            self.replayed += 1
            for output, found in zip(outputs, run(*kept), strict=True):
                if isinstance(output, torch.Tensor):
                    output.copy_(found)

        return replay, outputs


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(cuda_graphs, "record", found.record)
    return found


class Steps:
    """Calls a recorded step and the plain one side by side, each with a cache of its own."""

    def __init__(self, notes: list[str] | None = None) -> None:
        self.weight = torch.ones(2)
        self.notes = [] if notes is None else notes
        self.run = RecordedRun(step, frozenset({CACHE}), self.notes.append)
        self.begin()
        self.held: list[torch.Tensor] = []

    def begin(self) -> None:
        self.cache, self.wanted = torch.zeros(2), torch.zeros(2)

    def take(self, value: float) -> None:
        token = torch.full((2,), value)
        self.held.append(token)  # so that the next one lies elsewhere
        total, cache, three = self.run(self.weight, self.cache, token)
        wanted, _, _ = step(self.weight, self.wanted, token.clone())
        assert torch.equal(total, wanted)
        assert cache is self.cache
        assert torch.equal(self.cache, self.wanted)
        assert three == 3
        self.held.append(total)


def test_it_is_replayed_once_only_small_inputs_move(device):
    steps = Steps()
    for value in range(6):
        steps.take(value)
    assert (device.recorded, device.replayed, steps.run.replays) == (1, 4, 4)


def test_what_was_returned_outlives_the_next_replay(device):
    steps = Steps()
    for value in range(4):
        steps.take(value)
    before = steps.held[-1].clone()
    steps.take(9)
    assert torch.equal(steps.held[-3], before)


def test_another_cache_is_recorded_anew(device):
    steps = Steps()
    for _ in range(2):
        for value in range(5):
            steps.take(value)
        old = steps.cache
        steps.begin()
    assert device.recorded == 2
    assert torch.equal(old, torch.full((2,), 10.0))


def test_another_weight_is_not_taken_for_the_recorded_one(device):
    steps = Steps()
    for value in range(4):
        steps.take(value)
    steps.weight = torch.full((2,), 5.0)
    for value in range(4):
        steps.take(value)
    assert device.recorded == 2


def test_large_inputs_are_not_copied_in_each_step(device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_SMALL", 4)
    steps = Steps()
    for value in range(6):
        steps.take(value)
    assert device.recorded == 0


def test_another_shape_is_not_replayed(device):
    steps = Steps()
    for value in range(4):
        steps.take(value)
    replayed = device.replayed
    steps.weight, steps.cache, steps.wanted = torch.ones(1), torch.zeros(2), torch.zeros(2)
    steps.take(1)
    assert device.replayed == replayed


def test_a_cache_is_not_kept_alive(monkeypatch):
    def record(run: Any, values: Any) -> Any:  # a graph holds addresses and no tensors
        outputs = run(*values)
        return (lambda: None), outputs

    monkeypatch.setattr(cuda_graphs, "record", record)
    run = RecordedRun(step, frozenset({CACHE}), print)
    cache = torch.zeros(2)
    tokens = [torch.full((2,), float(value)) for value in range(4)]
    weight = torch.ones(2)
    for token in tokens:
        run(weight, cache, token)
    assert run.replays == 2
    gone = weakref.ref(cache)
    del cache
    assert gone() is None


def test_what_cannot_be_recorded_goes_on_as_it_was(monkeypatch):
    def refuse(run: Any, values: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graphs, "record", refuse)
    steps = Steps()
    for value in range(6):
        steps.take(value)
    [note] = steps.notes
    assert note.endswith("launched kernel by kernel: operation not permitted when stream is capturing")


def test_views_of_inputs_are_not_recorded(device):
    notes: list[str] = []
    run = RecordedRun(lambda x, y: (x[:1] + 0 * y, x[:1]), frozenset(), notes.append)
    x = torch.ones(2)
    for _ in range(4):
        _, view = run(x, torch.ones(1))
        assert view.data_ptr() == x.data_ptr()
    assert "view of an input" in notes[0]


def test_threads_take_turns(device):
    weight, cache = torch.ones(2), torch.zeros(2)
    run = RecordedRun(step, frozenset({CACHE}), print)

    def work() -> None:
        for _ in range(50):
            run(weight, cache, torch.ones(2))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(cache, torch.full((2,), 200.0))


@pytest.mark.newest("Inductor of older ones cannot compile padded rows for a CPU")
def test_decode_steps_of_whole_requests_are_replayed(device, monkeypatch):
    monkeypatch.setattr(variants, "recordable", lambda gm: True)
    skipped = {"model.layers.0.self_attn": 0.97, "model.layers.2.mlp": 1.03}
    model = tiny("llama", num_hidden_layers=3)
    plan = replace(SkipPlan.from_scales(skipped, window=6), beta=-2.0)
    adaskip_compile.compile(model, plan, keep_captures=False)
    row = tokens(1, 11)[0]
    for rows in ([row], [row.flip(0)], [row, row[3:]]):
        ids, mask = left_padded(rows)
        wanted = generate(model, ids, mask, 16, cache=make_cache("dynamic", model))
        before = device.replayed
        got = generate(model, ids, mask, 16, cache=make_cache("static", model))
        assert torch.equal(got, wanted)
        assert device.replayed - before >= 8  # of 15: the first steps of each variant and request are not
    [session] = adaskip_compile.report(model).sessions
    replays = {
        (graph.phase, variant.probed > 0): variant.replays for graph in session.graphs for variant in graph.variants
    }
    assert sum(variant.replays for graph in session.graphs for variant in graph.variants) == device.replayed
    assert replays.keys() == {("prefill", False), ("decode", False), ("decode", True)}
    assert "calls replayed from a CUDA graph" in str(adaskip_compile.report(model))


def test_it_can_be_turned_off(device, monkeypatch):
    monkeypatch.setattr(variants, "recordable", lambda gm: True)
    model = tiny("llama")
    adaskip_compile.compile(model, SkipPlan.none(), cuda_graphs=False, keep_captures=False)
    ids, mask = left_padded([tokens(1, 11)[0]])
    generate(model, ids, mask, 6, cache=make_cache("static", model))
    assert device.recorded == 0


def test_graphs_on_the_cpu_are_not_recorded():
    gm = first_graph(step, torch.ones(2), torch.zeros(2), torch.ones(2))
    assert not recordable(gm)


def test_what_a_graph_writes_is_told_by_position():
    gm = first_graph(lambda weight, cache, token: step(weight, cache, token)[:1], *torch.zeros(3, 2))
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    [place] = positions_written(gm)
    assert "cache" in names[place]
