"""A request goes on under its own plan and at its own place, whatever is done to its cache and whatever ran between."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import LegalityError, SkipPlan
from adaskip_compile.capture.dynamo import capture_count
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from tests.adaskip_compile.kv_cache.requests_alone import (
    FFN,
    IDS,
    ONE,
    OTHER,
    SCALED,
    Scales,
    alone,
    assert_same,
    begin,
    go_on,
    ramp_plan,
    use,
    window_plan,
)
from tests.generation import CACHES, left_padded, make_cache
from tests.models import plain, tiny, tokens
from tests.reference import omit_sublayers, run_request


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Keep captures for a whole module: all plans share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", num_hidden_layers=4)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("second", [OTHER, SCALED, FFN], ids=["other holes", "equal holes", "no holes"])
def test_a_copy_goes_on_under_the_plan_of_its_original(llama: Any, kind: str, second: Scales) -> None:
    first_cache = begin(llama, ONE, make_cache(kind, llama))
    second_cache = begin(llama, second, make_cache(kind, llama), seed=1)
    use(llama, OTHER)
    twins = [copy.deepcopy(first_cache), copy.deepcopy(second_cache)]
    got = [go_on(llama, twin, IDS) for twin in twins]
    originals = [go_on(llama, cache, IDS) for cache in (first_cache, second_cache)]
    for place, scales in enumerate((ONE, second)):
        wanted = alone(llama, scales, make_cache(kind, llama), IDS, seed=place)
        assert_same(got[place], wanted)
        assert_same(originals[place], wanted)


@pytest.mark.parametrize("kind", CACHES)
def test_rows_move_while_another_request_is_at_the_same_length(llama: Any, kind: str) -> None:
    def turn(cache: Any) -> None:
        cache.reorder_cache(torch.tensor([1, 0]))

    first, second = begin(llama, ONE, make_cache(kind, llama)), begin(llama, SCALED, make_cache(kind, llama), seed=1)
    for cache in (first, second):
        turn(cache)
    for place, (cache, scales) in enumerate(((first, ONE), (second, SCALED))):
        use(llama, OTHER)
        got = go_on(llama, cache, IDS)
        assert_same(got, alone(llama, scales, make_cache(kind, llama), IDS, seed=place, act=turn))


def test_rows_padded_with_an_embedding_of_zeros(llama: Any) -> None:
    ids, mask = left_padded([tokens(1, 4)[0], tokens(1, 6, seed=1)[0], tokens(1, 9, seed=2)[0]])
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0

    def act(switch: Callable[[], None]) -> torch.Tensor:
        cache = make_cache("dynamic", model)
        run_request(model, ids, tokens(3, 2, seed=3), cache=cache, mask=mask)
        switch()
        cache.batch_select_indices(torch.tensor([0, 1]))  # both are padded
        seen = torch.cat([mask[:2], torch.ones(2, 3, dtype=torch.long)], dim=1)
        with torch.no_grad():
            positions = (seen.sum(1) - 1)[:, None]
            return model(
                tokens(2, 1), attention_mask=seen, position_ids=positions, **cache_argument(model, cache)
            ).logits

    use(model, ONE)
    got = act(lambda: use(model, OTHER))
    model._compiled_call_impl = None
    with omit_sublayers(model, ONE):
        assert_same(got, act(lambda: None))


@pytest.mark.parametrize("make_plan", [ramp_plan, window_plan], ids=["ramp", "window"])
@pytest.mark.parametrize("kind", CACHES)
def test_copies_at_different_places_keep_their_place(llama: Any, kind: str, make_plan: Callable[[], SkipPlan]) -> None:
    plan = make_plan()
    use(llama, plan)

    def whole(seed: int, steps: int) -> torch.Tensor:
        cache = make_cache(kind, llama)
        forced = torch.cat([tokens(2, steps, seed=seed + 50), IDS], dim=1)
        return torch.stack(run_request(llama, tokens(2, 9, seed=seed), forced, cache=cache)[-4:])

    wanted = [whole(seed, steps) for seed, steps in ((0, 1), (1, 4))]
    assert (wanted[0] - whole(0, 4)).abs().max() > 1e-3
    caches = [begin(llama, plan, make_cache(kind, llama), seed=seed, steps=steps) for seed, steps in ((0, 1), (1, 4))]
    twins = [copy.deepcopy(cache) for cache in caches]
    for cache in caches:  # what goes on first must not move the other's place
        go_on(llama, cache, IDS[:, :2])
    for twin, expected in zip(twins, wanted, strict=True):
        assert_same(go_on(llama, twin, IDS), expected)
    for cache, expected in zip(caches, wanted, strict=True):
        assert_same(go_on(llama, cache, IDS[:, 2:]), expected[2:])


def test_a_cache_that_the_model_makes_is_copied_before_its_second_call(llama: Any) -> None:
    use(llama, ONE)
    with torch.no_grad():
        cache = cache_of(llama(tokens(2, 9), use_cache=True))
    use(llama, FFN)
    run_request(llama, tokens(2, 9, seed=1), tokens(2, 1), cache=make_cache("dynamic", llama))
    twin = copy.deepcopy(cache)
    got = [go_on(llama, twin, IDS), go_on(llama, cache, IDS)]
    llama._compiled_call_impl = None
    with omit_sublayers(llama, ONE), torch.no_grad():
        wanted = go_on(llama, cache_of(llama(tokens(2, 9), use_cache=True)), IDS)
    for one in got:
        assert_same(one, wanted)


def test_a_static_cache_that_is_reset_begins_a_new_request(llama: Any) -> None:
    cache = begin(llama, ONE, make_cache("static", llama))
    twin = copy.deepcopy(cache)
    twin.reset()
    use(llama, FFN)
    before = len(adaskip_compile.report(llama).requests)
    got = torch.stack(run_request(llama, tokens(2, 9, seed=2), IDS, cache=twin))
    rest = go_on(llama, cache, IDS)
    assert len(adaskip_compile.report(llama).requests) == before + 1
    assert_same(rest, alone(llama, ONE, make_cache("static", llama), IDS))
    with omit_sublayers(llama, FFN):
        assert_same(got, torch.stack(run_request(llama, tokens(2, 9, seed=2), IDS, cache=make_cache("static", llama))))


def test_a_cache_that_shares_the_layers_of_another_goes_its_own_way(llama: Any) -> None:
    cache = begin(llama, window_plan(), make_cache("dynamic", llama), steps=1)
    twin, late = copy.copy(cache), copy.copy(cache)
    twin.layers, late.layers = ([copy.copy(layer) for layer in cache.layers] for _ in range(2))
    first = [go_on(llama, one, IDS) for one in (twin, cache)]
    assert_same(first[0], first[1])
    with pytest.raises(LegalityError, match=r"request \d+ has gone on in that since.*copy\.deepcopy"):
        go_on(llama, late, IDS)


def forward_of(model: Any, how: str) -> Any:
    if how == "compile":
        return adaskip_compile.compile(model, SkipPlan.from_scales(ONE), inner="eager")
    options: dict[str, Any] = {"inner": "eager", "plan": SkipPlan.from_scales(ONE)}
    if how == "torch.compile":
        return torch.compile(model, backend="adaskip", options=options)
    model.compile(backend="adaskip", options=options)
    return model


@pytest.mark.parametrize("how", ["compile", "restored", "model.compile", "torch.compile"])
def test_every_door_marks_the_cache_object(how: str, cache_dir: Path) -> None:
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=4)
    if how == "restored":
        go_on(model, begin(model, ONE, make_cache("dynamic", model)), IDS)
        if not list(cache_dir.rglob("*.capture")):
            pytest.skip("captures are not kept with these versions")
        torch._dynamo.reset()
        model = tiny("llama", num_hidden_layers=4)
    call = forward_of(model, "compile" if how == "restored" else how)
    cache, other = make_cache("dynamic", model), make_cache("dynamic", model)
    run_request(call, tokens(2, 9), tokens(2, 1), cache=cache)
    assert "_adaskip_request" in vars(cache), "from the prompt on"
    before = capture_count()
    run_request(call, tokens(2, 9), tokens(2, 3, seed=50), cache=other)
    go_on(call, other, IDS)
    captured = capture_count()
    if how == "restored":
        assert before == captured
        graphs = adaskip_compile.report(model).sessions[0].graphs
        assert {graph.phase for graph in graphs if graph.restored} == {"prefill", "decode"}
    cache = make_cache("dynamic", model)
    run_request(call, tokens(2, 9), tokens(2, 3, seed=50), cache=cache)
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 0]))
    got = go_on(call, twin, IDS)
    [*_, request] = adaskip_compile.report(model).requests
    assert request.notes[-1].startswith("copied from request ")
    assert request.tokens["steady"] == 7
    assert capture_count() <= captured + 1, "a copied cache is laid out anew, no more"
    assert_same(
        got,
        alone(model, ONE, make_cache("dynamic", model), IDS, act=lambda one: one.reorder_cache(torch.tensor([1, 0]))),
    )


def test_a_mark_keeps_nothing_alive(llama: Any) -> None:
    cache = begin(llama, ONE, make_cache("dynamic", llama))
    seen = [weakref.ref(cache), *(weakref.ref(layer.keys) for layer in cache.layers)]
    del cache
    gc.collect()
    assert [one() for one in seen] == [None] * 5


class Plain:
    """A decoder whose cache is plain tensors, at some place of a request."""

    def __init__(self, model: Any, scales: Scales) -> None:
        self.model = model
        use(model, scales)
        with torch.no_grad():
            _, self.past = model(tokens(2, 9))
        self.step(tokens(2, 1))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits, self.past = self.model(ids, self.past)
        return logits[:, -1]


HOLE, DIFFERENT = {"blocks.1.attention": 0.9}, {"blocks.1.attention": 0.5}


def test_plain_tensors_are_copied_with_their_request() -> None:
    model = plain(layers=3, cached=True)
    first, second = Plain(model, HOLE), Plain(model, DIFFERENT)
    first.past = copy.deepcopy(first.past)
    got = [one.step(tokens(2, 1, seed=3)) for one in (first, second)]
    assert (got[0] - got[1]).abs().max() > 1e-3
    again = [Plain(model, scales).step(tokens(2, 1, seed=3)) for scales in (HOLE, DIFFERENT)]
    assert_same(torch.stack(got), torch.stack(again))


def test_moved_plain_tensors_of_which_it_is_not_known_whose_they_are_are_refused() -> None:
    model = plain(layers=3, cached=True)
    first, second = Plain(model, HOLE), Plain(model, DIFFERENT)
    moved = [tuple(entry.clone() for entry in pair) for pair in first.past]
    first.past = moved
    with pytest.raises(LegalityError, match="copied without the object that held it, and any of the requests 1, 2"):
        first.step(tokens(2, 1, seed=3))
    second.step(tokens(2, 1))  # its own
    del first, second
    torch._dynamo.reset()
    model = plain(layers=3, cached=True)
    alike, _ = Plain(model, HOLE), Plain(model, HOLE)
    past = alike.past
    wanted = alike.step(tokens(2, 1, seed=3))
    alike.past = [tuple(entry.clone() for entry in pair) for pair in past]
    assert_same(alike.step(tokens(2, 1, seed=3)), wanted)
