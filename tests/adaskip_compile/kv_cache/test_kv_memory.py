"""A skipped attention holds no keys and values, whatever is done to the cache, and the results stay right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.kv_cache.cache_argument import cache_argument
from tests.generation import CACHES, generate, make_cache
from tests.models import tiny, tokens
from tests.reference import omit_sublayers, run_request

pytestmark = pytest.mark.shares_captures

LAYERS = 6
SKIPPED = {"model.layers.0.self_attn": 0.95, "model.layers.3.self_attn": 1.03, "model.layers.4.self_attn": 0.9}
OTHERS = {"model.layers.1.self_attn": 1.02, "model.layers.2.mlp": 0.97}
NOTHING: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Keep captures for a whole module: all plans share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", num_hidden_layers=LAYERS)


class Skipping:
    """The model through the driver, under a plan that skips ``scales``."""

    def __init__(self, model: Any, scales: dict[str, float]) -> None:
        self.model, self.scales = model, scales

    def __enter__(self) -> None:
        adaskip_compile.compile(self.model, SkipPlan.from_scales(self.scales), inner="eager")

    def __exit__(self, *_: object) -> None:
        self.model._compiled_call_impl = None


def entries(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def held_bytes(cache: Any) -> int:
    """Return the bytes of all distinct storages of keys and values, room to grow included."""
    storages = [tensor.untyped_storage() for tensor in entries(cache)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def used_bytes(cache: Any) -> int:
    """Return the bytes of keys and values in distinct storages, without room to grow."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in entries(cache)}.values())


def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits ``(batch, vocabulary)`` of one more call on ``cache``."""
    with torch.no_grad():
        seen = int(cache.get_seq_length())
        positions = torch.arange(seen, seen + ids.shape[1]).expand(len(ids), -1)
        return model(ids, position_ids=positions, use_cache=True, **cache_argument(model, cache)).logits[:, -1]


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def both(llama: Any, act: Callable[[Callable[[], None]], Any]) -> tuple[Any, Any]:
    """Return what ``act`` gives through the driver, and on the eager model that omits the same sublayers.

    It is given a function to call in the middle of a request, which has the next request follow another plan.
    """
    with Skipping(llama, SKIPPED):
        got = act(lambda: Skipping(llama, OTHERS).__enter__())
    with omit_sublayers(llama, SKIPPED):
        return got, act(lambda: None)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_holds_only_kept_attentions(llama, kind):
    def run(steps: int) -> Any:
        cache = make_cache(kind, llama)
        run_request(llama, tokens(2, 9), tokens(2, steps, seed=1), cache=cache)
        return cache

    for steps in (1, 7):
        with Skipping(llama, NOTHING):
            full = run(steps)
        assert held_bytes(full) > 0
        with Skipping(llama, SKIPPED):
            skipping = run(steps)
        assert held_bytes(skipping) * LAYERS == held_bytes(full) * (LAYERS - len(SKIPPED))
        assert used_bytes(skipping) * LAYERS == used_bytes(run(steps)) * (LAYERS - len(SKIPPED))
        assert int(skipping.get_seq_length()) == int(full.get_seq_length()) == 9 + steps
        assert adaskip_compile.report(llama).requests[-1].kv_bytes == held_bytes(skipping)
        shapes = [[layer.keys.shape for layer in cache.layers] for cache in (full, skipping)]
        assert shapes[0] == shapes[1]


def test_a_static_cache_is_used_again_under_another_plan(llama):
    cache = make_cache("static", llama)
    for round_, scales in enumerate((SKIPPED, OTHERS, SKIPPED, NOTHING)):
        prompt, forced = tokens(1, 9 + round_, seed=round_), tokens(1, 6, seed=10 + round_)
        cache.reset()
        with Skipping(llama, scales):
            got = run_request(llama, prompt, forced, cache=cache)
        with omit_sublayers(llama, scales):
            wanted = run_request(llama, prompt, forced, cache=make_cache("static", llama))
        assert_same(torch.stack(got), torch.stack(wanted))
        holes = sum(path.endswith("self_attn") for path in scales)
        one = held_bytes(make_used(llama)) // LAYERS
        assert held_bytes(cache) == one * (LAYERS - holes)


def make_used(llama: Any) -> Any:
    cache = make_cache("static", llama)
    run_request(llama, tokens(1, 4), tokens(1, 1), cache=cache)
    return cache


def test_crop(llama):
    def act(switch_plan: Callable[[], None]) -> tuple[torch.Tensor, int, int]:
        cache = make_cache("dynamic", llama)
        run_request(llama, tokens(2, 9), tokens(2, 5, seed=1), cache=cache)
        switch_plan()
        cache.crop(-2)
        length = int(cache.get_seq_length())
        logits = [step(llama, cache, ids) for ids in tokens(2, 4, seed=2).split(1, dim=1)]
        cache.crop(-8)
        return torch.stack([*logits, step(llama, cache, tokens(2, 1, seed=3))]), length, int(cache.get_seq_length())

    (got, *lengths), (wanted, *wanted_lengths) = both(llama, act)
    assert_same(got, wanted)
    assert lengths == wanted_lengths == [12, 9]


@pytest.mark.parametrize("kind", CACHES)
def test_beam_search(llama, kind):
    def act(_: Callable[[], None]) -> torch.Tensor:
        ids = tokens(2, 9)
        cache = make_cache(kind, llama)
        return generate(llama, ids, torch.ones_like(ids), 12, num_beams=3, cache=cache)

    got, wanted = both(llama, act)
    assert torch.equal(got, wanted)
    greedy = generate(llama, tokens(2, 9), torch.ones(2, 9, dtype=torch.long), 12)
    assert not torch.equal(got, greedy)


RESHAPES: dict[str, Callable[[Any], None]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "duplicate": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
}


@pytest.mark.parametrize("reshape", RESHAPES.values(), ids=RESHAPES)
@pytest.mark.parametrize("kind", CACHES)
def test_rows_are_moved_mid_request(llama, kind, reshape):
    if kind == "static" and reshape in (RESHAPES["select"], RESHAPES["repeat"]):
        pytest.skip("a preallocated cache keeps its batch size")
    caches = []

    def act(switch_plan: Callable[[], None]) -> torch.Tensor:
        cache = make_cache(kind, llama)
        run_request(llama, tokens(3, 9), tokens(3, 3, seed=1), cache=cache)
        switch_plan()
        reshape(cache)
        caches.append(cache)
        rows = len(cache.layers[0].keys)
        return torch.stack([step(llama, cache, ids) for ids in tokens(rows, 4, seed=2).split(1, dim=1)])

    got, wanted = both(llama, act)
    assert_same(got, wanted)
    skipping, omitting = caches
    assert int(skipping.get_seq_length()) == int(omitting.get_seq_length()) == 9 + 3 + 4
    assert used_bytes(skipping) * LAYERS == used_bytes(omitting) * (LAYERS - len(SKIPPED))


@pytest.mark.parametrize("kind", CACHES)
def test_a_copied_cache_goes_its_own_way(llama, kind):
    def act(switch_plan: Callable[[], None]) -> torch.Tensor:
        cache = make_cache(kind, llama)
        run_request(llama, tokens(2, 9), tokens(2, 3, seed=1), cache=cache)
        switch_plan()
        twin = copy.deepcopy(cache)
        logits: list[torch.Tensor] = []
        for ids, other in zip(tokens(2, 4, seed=2).split(1, 1), tokens(2, 4, seed=3).split(1, 1), strict=True):
            logits += [step(llama, cache, ids), step(llama, twin, other)]
        return torch.stack(logits)

    got, wanted = both(llama, act)
    assert_same(got, wanted)
    assert not torch.allclose(got[-1], got[-2])
