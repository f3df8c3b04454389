from __future__ import annotations

from types import SimpleNamespace

import torch

from adaskip_compile.evaluation.timing import Generation, Spread, cache_bytes, generate, take_turns
from tests.models import tiny, tokens


def test_a_spread_is_median_least_and_greatest():
    spread = Spread.of([3.0, 1.0, 2.0, 10.0])
    assert spread == Spread(2.5, 1.0, 10.0)
    assert spread.format(1000, 1, " ms") == "2500.0 ms (1000.0 to 10000.0)"


def test_steady_time_leaves_out_the_window_and_the_step_after_it():
    later = (9.0, 9.0, 9.0, 1.0, 2.0, 3.0)
    assert Generation((), 1.0, later, 0).steady(window=2) == 2.0


def test_ways_take_turns():
    order: list[str] = []

    def way(name: str):
        return lambda: order.append(name) or Generation((), 0.0, (), 0)

    results = take_turns({"a": way("a"), "b": way("b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert {name: len(runs) for name, runs in results.items()} == {"a": 2, "b": 2}


def test_generation_is_greedy_timed_and_of_the_length_asked_for():
    model, ids = tiny("llama"), tokens(length=9)
    found = generate(model, ids, 6)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert list(found.tokens) == expected[0, 9:].tolist()
    assert len(found.later) == 5
    assert found.first > 0
    assert min(found.later) > 0


def test_an_end_of_text_token_does_not_shorten_a_measurement():
    model, ids = tiny("llama"), tokens(length=9)
    model.generation_config.eos_token_id = generate(model, ids, 1).tokens[0]
    assert len(generate(model, ids, 6).tokens) == 6


def test_cache_bytes_are_those_of_the_real_cache():
    model = tiny("llama", num_hidden_layers=3)
    found = generate(model, tokens(length=9), 6)
    heads, width, held, float32 = 2, 16, 9 + 5, 4
    assert found.cache_bytes == 3 * 2 * heads * width * held * float32


def test_storage_that_layers_share_counts_once():
    keys = torch.zeros(1, 2, 8, 4)
    layers = [
        SimpleNamespace(keys=keys, values=keys[:, :1], length=8),
        SimpleNamespace(keys=keys[..., :2], values=None),
    ]
    assert cache_bytes(SimpleNamespace(layers=layers)) == keys.numel() * 4
