"""A plan that skips nothing changes nothing: greedy tokens equal eager's, whichever way the model is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.texts import profiling_texts
from tests.generation import CACHES, generate, greedy_loop, left_padded, make_cache
from tests.models import tiny, tokens
from tests.reference import run_request

STEPS = 64
OPTIONS = {"plan": SkipPlan.none(), "inner": "eager"}


def through_compile(model: Any, ids: Any, mask: Any, cache: Any, options: dict) -> torch.Tensor:
    if model._compiled_call_impl is None:
        model.compile(backend="adaskip", options=options)
    return generate(model, ids, mask, STEPS, cache=cache)


def through_wrapper(model: Any, ids: Any, mask: Any, cache: Any, options: dict) -> torch.Tensor:
    return greedy_loop(torch.compile(model, backend="adaskip", options=options), ids, mask, STEPS, cache=cache)


def through_compile_config(model: Any, ids: Any, mask: Any, cache: Any, options: dict) -> torch.Tensor:
    from transformers import CompileConfig

    config = CompileConfig(backend="adaskip", options=options)
    config.mode = None  # type: ignore[assignment]  # torch takes a mode or options, and here a mode is the default
    config._compile_all_devices = True
    return generate(model, ids, mask, STEPS, cache=cache, compile_config=config)


# transformers compiles decode only, and only with a cache of fixed size.
WAYS = [
    *((through_compile, kind) for kind in CACHES),
    *((through_wrapper, kind) for kind in CACHES),
    (through_compile_config, "static"),
]
WAY_NAMES = [f"{way.__name__.removeprefix('through_')}-{kind}" for way, kind in WAYS]
every_way = pytest.mark.parametrize(("way", "kind"), WAYS, ids=WAY_NAMES)


EAGER: dict[tuple[int, ...], torch.Tensor] = {}


def eager_tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what the model generates when it is not compiled; the same request is run once."""
    key = (id(model), *ids.shape)
    if key not in EAGER:
        compiled, model._compiled_call_impl = model._compiled_call_impl, None
        EAGER[key] = generate(model, ids, mask, STEPS)
        model._compiled_call_impl = compiled
    return EAGER[key]


def check_tokens(
    model: Any, way: Callable[..., torch.Tensor], cache: Any, rows: list[torch.Tensor], options: dict = OPTIONS
) -> None:
    """Compare the tokens of one request of ``rows`` with eager's, and see that its calls went through the backend."""
    ids, mask = left_padded(rows)
    eager = eager_tokens(model, ids, mask)
    before = len(adaskip_compile.report(model).requests)
    got = way(model, ids, mask, cache, options)
    assert torch.equal(got, eager), f"{len(rows)} rows of {ids.shape[1]} tokens"
    report = adaskip_compile.report(model)
    assert not report.sessions[-1].unskipped_graphs
    assert len(report.requests) == before + 1
    last = report.requests[-1]
    assert last.batch == len(rows)
    assert last.tokens["steady"] == STEPS - 1
    assert last.tokens["prefill"] == (0 if way is through_compile_config else ids.shape[1])


@every_way
def test_tokens_of_a_tiny_model(way, kind):
    model = tiny("llama", num_hidden_layers=2)
    row = tokens(1, 17)[0]
    for rows in ([row], [row, row[5:]]):
        check_tokens(model, way, make_cache(kind, model), rows)


@pytest.mark.newest("Inductor of 2.11 cannot compile a mask of padded rows for a CPU")
@pytest.mark.parametrize("kind", CACHES)
def test_tokens_through_inductor(kind):
    model = tiny("llama", num_hidden_layers=2)
    adaskip_compile.compile(model, SkipPlan.none(), inner="inductor")
    check_tokens(model, through_compile, make_cache(kind, model), [tokens(1, 17)[0]])


def test_a_static_cache_without_a_mask_through_inductor():
    model = tiny("llama")
    request = tokens(1, 9), tokens(1, 4, seed=1)
    eager = run_request(model, *request, cache=make_cache("static", model))
    # A capture that is kept names its symbols anew.
    adaskip_compile.compile(model, SkipPlan.none(), inner="inductor", keep_captures=False)
    got = run_request(model, *request, cache=make_cache("static", model))
    torch.testing.assert_close(got, eager, rtol=2e-5, atol=2e-5)


# (prompt tokens, rows): every way and cache meets them all.
REAL_REQUESTS = [(17, 1), (17, 2), (512, 1), (512, 2), (2048, 1), (2048, 2)]


@pytest.mark.newest("Inductor of 2.11 cannot compile a mask of padded rows for a CPU")
@pytest.mark.pretrained
@pytest.mark.slow
@every_way
def test_tokens_of_a_real_model(part_of_smollm2, way, kind):
    model, tokenizer = part_of_smollm2
    options = {**OPTIONS, "inner": "inductor"} if way is through_compile else OPTIONS
    text = tokenizer(" ".join(document.text for document in profiling_texts(2)), return_tensors="pt")["input_ids"][0]
    try:
        for length, count in REAL_REQUESTS:
            rows = [text[:length], text[7:length]][:count]
            check_tokens(model, way, make_cache(kind, model, length + STEPS), rows, options)
    finally:
        model._compiled_call_impl = None
