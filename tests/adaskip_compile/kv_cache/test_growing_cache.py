"""A cache that grows is appended to in place, and whatever is done to it, it stays what eager code would hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.capture.dynamo import capture_count
from adaskip_compile.kv_cache import growing_storage
from adaskip_compile.kv_cache.cache_argument import cache_argument
from tests.generation import generate, greedy_loop, left_padded, make_cache
from tests.models import plain, tiny, tokens
from tests.reference import omit_sublayers, run_request

HOLES = {"model.layers.0.self_attn": 0.95, "model.layers.2.self_attn": 1.03}
NOTHING: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Keep captures for the whole module: all plans share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch):
    """Let storages have room for 4 tokens more, so that few tokens grow them often."""
    monkeypatch.setattr(growing_storage, "_LEAST", 4)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", num_hidden_layers=4)


@contextmanager
def compiled(model: Any, scales: dict[str, float] = NOTHING, **options: Any) -> Iterator[None]:
    adaskip_compile.compile(model, SkipPlan.from_scales(scales), inner="eager", **options)
    try:
        yield
    finally:
        model._compiled_call_impl = None


def entries(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def memory(cache: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in entries(cache)]


def both(llama: Any, act: Callable[[], Any], scales: dict[str, float] = NOTHING) -> tuple[Any, Any]:
    """Return what ``act`` gives through the driver, and on the eager model that omits the same sublayers."""
    with compiled(llama, scales):
        got = act()
    with omit_sublayers(llama, scales):
        return got, act()


def assert_same_cache(got: Any, wanted: Any) -> None:
    for one, other in zip(entries(got), entries(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=2e-5, atol=2e-5)


def decode(model: Any, cache: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits after each token of ``ids``, ``(batch, steps)``."""
    return [call(model, cache, one) for one in ids.split(1, dim=1)]


@torch.no_grad()
def call(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    seen = cache.get_seq_length()
    positions = torch.arange(seen, seen + ids.shape[1]).expand(len(ids), -1)
    return model(ids, position_ids=positions, use_cache=True, **cache_argument(model, cache)).logits[:, -1]


@pytest.mark.parametrize("regions", ["shared", "whole"])
def test_tokens_and_cache_are_those_of_eager(llama, regions):
    ids = tokens(1, 9)
    mask = torch.ones_like(ids)
    wanted = make_cache("dynamic", llama)
    expected = greedy_loop(llama, ids, mask, 20, cache=wanted)
    with compiled(llama, regions=regions):
        greedy_loop(llama, ids, mask, 3, cache=make_cache("dynamic", llama))
        captured = capture_count()
        cache = make_cache("dynamic", llama)
        places: list[list[int]] = []
        chosen = [greedy_loop(llama, ids, mask, 1, cache=cache)]
        for _ in range(19):
            places.append(memory(cache))
            mask = torch.cat([mask, torch.ones_like(ids[:, :1])], dim=1)
            chosen.append(greedy_loop(llama, chosen[-1], mask, 1, cache=cache))
    assert torch.equal(torch.cat(chosen, dim=1), expected)
    assert_same_cache(cache, wanted)
    moves = sum(before != after for before, after in pairwise(places))
    assert 2 <= moves <= 5  # room for 4 tokens lasts for 4 steps and a copy in the fifth
    assert capture_count() == captured


@pytest.mark.parametrize("fork", [copy.deepcopy, copy.copy], ids=["deepcopy", "shared"])
@pytest.mark.parametrize("scales", [NOTHING, HOLES], ids=["full", "holes"])
def test_both_ends_of_a_fork_go_on(llama, fork, scales):
    def act() -> tuple[list[torch.Tensor], Any, Any]:
        cache = make_cache("dynamic", llama)
        run_request(llama, tokens(2, 9), tokens(2, 3, seed=1), cache=cache)
        twin = copy.copy(cache)
        twin.layers = [fork(layer) for layer in cache.layers]
        logits: list[torch.Tensor] = []
        for ids, other in zip(tokens(2, 7, seed=2).split(1, 1), tokens(2, 7, seed=3).split(1, 1), strict=True):
            logits += [call(llama, cache, ids), call(llama, twin, other)]
        return logits, cache, twin

    (got, *caches), (wanted, *expected) = both(llama, act, scales)
    assert_same(got, wanted)
    for cache, other in zip(caches, expected, strict=True):
        if scales is NOTHING:
            assert_same_cache(cache, other)
        assert len(set(memory(cache))) == 2 * (4 - len(scales))
    assert not set(memory(caches[0])) & set(memory(caches[1]))


def test_old_references_keep_their_tokens(llama):
    def act() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        cache = make_cache("dynamic", llama)
        run_request(llama, tokens(1, 9), tokens(1, 1, seed=1), cache=cache)
        old = [(tensor, tensor.clone()) for tensor in entries(cache)]
        cache.crop(-3)
        shorter = decode(llama, cache, tokens(1, 2, seed=4))
        for tensor, before in old:
            assert torch.equal(tensor, before)
        return shorter, [tensor.clone() for tensor in entries(cache)]

    (got, entries_got), (wanted, entries_wanted) = both(llama, act)
    assert_same(got, wanted)
    for one, other in zip(entries_got, entries_wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=["beams", "all"])
def test_beam_search(llama, how):
    def act() -> torch.Tensor:
        ids = tokens(2, 9)
        return generate(llama, ids, torch.ones_like(ids), 12, **how)

    got, wanted = both(llama, act)
    assert torch.equal(got, wanted)


def test_requests_take_turns(llama):
    def act() -> list[torch.Tensor]:
        caches = [make_cache("dynamic", llama) for _ in range(2)]
        logits = [call(llama, cache, tokens(1, 7 + 3 * n, seed=n)) for n, cache in enumerate(caches)]
        for ids in tokens(1, 12, seed=9).split(1, dim=1):
            logits += [call(llama, cache, ids) for cache in caches]
        return logits

    assert_same(*both(llama, act))


@pytest.mark.parametrize("scales", [NOTHING, HOLES], ids=["full", "holes"])
def test_a_second_turn_is_appended_in_place(llama, scales, monkeypatch):
    monkeypatch.setattr(growing_storage, "_LEAST", 16)
    moved: list[bool] = []

    def act() -> list[torch.Tensor]:
        cache = make_cache("dynamic", llama)
        logits = run_request(llama, tokens(2, 9), tokens(2, 3, seed=1), cache=cache)
        before = memory(cache)
        logits.append(call(llama, cache, tokens(2, 5, seed=2)))
        moved.append(memory(cache) != before)
        return [*logits, *decode(llama, cache, tokens(2, 9, seed=3))]

    assert_same(*both(llama, act, scales))
    assert moved == [False, True]  # through the driver, and eagerly


def test_left_padding(llama):
    ids, mask = left_padded([tokens(1, 9)[0], tokens(1, 5, seed=1)[0]])

    def act() -> torch.Tensor:
        return greedy_loop(llama, ids, mask, 12, cache=make_cache("dynamic", llama))

    got, wanted = both(llama, act)
    assert torch.equal(got, wanted)


def test_a_cache_of_another_making_is_taken_over():
    """Prefill that returns views of a larger tensor, and no concatenation: the first step copies, the others do not."""
    model = plain(cached=True)
    with torch.no_grad():
        logits, past = model(tokens(1, 9))
        wanted = [logits]
        for ids in tokens(1, 6, seed=1).split(1, dim=1):
            logits, past = model(ids, past)
            wanted.append(logits)
        with compiled(model):
            logits, past = model(tokens(1, 9))
            got = [logits]
            places: list[int] = []
            for ids in tokens(1, 6, seed=1).split(1, dim=1):
                logits, past = model(ids, past)
                got.append(logits)
                places.append(past[0][0].data_ptr())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    assert len(set(places)) == 2


def test_a_request_may_leave_inference_mode(llama):
    def act() -> list[torch.Tensor]:
        cache = make_cache("dynamic", llama)
        with torch.inference_mode():
            first = run_request(llama, tokens(1, 9), tokens(1, 2, seed=1), cache=cache)
        return [*(one.clone() for one in first), *decode(llama, cache, tokens(1, 4, seed=2))]

    assert_same(*both(llama, act))


def test_training_mode_runs_and_appends(llama):
    def act() -> list[torch.Tensor]:
        llama.train()
        try:
            return run_request(llama, tokens(1, 9), tokens(1, 4, seed=1), cache=make_cache("dynamic", llama))
        finally:
            llama.eval()

    assert_same(*both(llama, act))
