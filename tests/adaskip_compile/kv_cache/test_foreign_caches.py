"""Caches that were filled elsewhere: under other options, by another model or process, or by code that is not compiled."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import LegalityError, SkipPlan
from tests.adaskip_compile.kv_cache.requests_alone import (
    FFN,
    IDS,
    ONE,
    OTHER,
    SCALED,
    alone,
    assert_same,
    begin,
    go_on,
    use,
)
from tests.generation import CACHES, make_cache
from tests.models import plain, tiny, tokens


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Keep captures for a whole module: all plans share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", num_hidden_layers=4)


LACKS = r"no entries for model\.layers\.0\.self_attn, model\.layers\.2\.self_attn: another compilation of this model"


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("second", ["compile", "torch.compile"])
def test_the_same_model_compiled_otherwise_does_not_run_what_the_cache_lacks(
    llama: Any, kind: str, second: str
) -> None:
    cache = begin(llama, ONE, make_cache(kind, llama))
    if second == "compile":
        call = adaskip_compile.compile(llama, SkipPlan.from_scales(OTHER), inner="eager", regions="whole")
    else:
        options: dict[str, Any] = {"inner": "eager", "plan": SkipPlan.from_scales(OTHER)}
        llama._compiled_call_impl = None
        call = torch.compile(llama, backend="adaskip", options=options)
    with pytest.raises(LegalityError, match=LACKS):
        go_on(call, cache, IDS)


def test_the_same_model_compiled_otherwise_goes_on_with_equal_holes(llama: Any) -> None:
    cache = begin(llama, ONE, make_cache("dynamic", llama))
    adaskip_compile.compile(llama, SkipPlan.from_scales(SCALED), inner="eager", regions="whole")
    go_on(llama, cache, IDS)
    [*_, request] = adaskip_compile.report(llama).requests
    assert request.skipped == SCALED
    assert request.notes == ("its cache was filled by another compilation",)
    use(llama, ONE)
    go_on(llama, cache, IDS)  # and back


def test_a_cache_without_holes_goes_anywhere(llama: Any) -> None:
    cache = begin(llama, FFN, make_cache("dynamic", llama))
    adaskip_compile.compile(llama, SkipPlan.from_scales({}), inner="eager", regions="whole")
    go_on(llama, cache, IDS)
    assert adaskip_compile.report(llama).requests[-1].notes == ("its cache was filled by another compilation",)


def test_another_model_does_not_take_a_cache_with_holes(llama: Any) -> None:
    cache = begin(llama, ONE, make_cache("dynamic", llama))
    model = tiny("llama", num_hidden_layers=4, seed=3)
    use(model, ONE)
    with pytest.raises(LegalityError, match=r"no entries for model\.layers\.0\.self_attn, .*: another model filled it"):
        go_on(model, cache, IDS)


def test_tokens_that_uncompiled_code_has_added_are_noticed(llama: Any) -> None:
    cache = begin(llama, ONE, make_cache("dynamic", llama))
    compiled, llama._compiled_call_impl = llama._compiled_call_impl, None
    go_on(llama, cache, IDS[:, :2])
    llama._compiled_call_impl = compiled
    with pytest.raises(
        LegalityError, match=r"grown by 2 tokens in code that adaskip did not compile.*layers\.0\.self_attn"
    ):
        go_on(llama, cache, IDS[:, 2:])


@pytest.mark.parametrize("kind", CACHES)
def test_a_pickled_cache_goes_on_in_its_process(llama: Any, kind: str) -> None:
    cache = begin(llama, ONE, make_cache(kind, llama))
    stored = pickle.dumps(cache)
    go_on(llama, cache, IDS)
    use(llama, OTHER)
    for _ in range(2):
        assert_same(go_on(llama, pickle.loads(stored), IDS), alone(llama, ONE, make_cache(kind, llama), IDS))
        use(llama, FFN)


READ = """
import pickle, sys
cache = pickle.load(open(sys.argv[1], "rb"))
assert "adaskip_compile" not in sys.modules
print(sorted(vars(cache)["_adaskip_request"]["holes"]))
from tests.adaskip_compile.kv_cache.requests_alone import *
from adaskip_compile import LegalityError
from tests.models import tiny
model = tiny("llama", num_hidden_layers=4)
use(model, OTHER)
try:
    go_on(model, cache, IDS)
except LegalityError as error:
    print(error)
use(model, ONE)
go_on(model, cache, IDS)
"""


def test_a_pickled_cache_is_read_in_another_process(llama: Any, tmp_path: Any) -> None:
    cache = begin(llama, ONE, make_cache("dynamic", llama))
    (tmp_path / "cache").write_bytes(pickle.dumps(cache))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "cache")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("['model.layers.0.self_attn', 'model.layers.2.self_attn']")
    assert "this cache has no entries for model.layers.0.self_attn" in done.stdout


def test_tensors_with_a_mark_are_loaded_as_weights_only() -> None:
    model = plain(layers=3, cached=True)
    use(model, {"blocks.1.attention": 0.9})
    with torch.no_grad():
        _, past = model(tokens(2, 9))
        stored = io.BytesIO()
        torch.save(past, stored)
        wanted, _ = model(tokens(2, 1), past)
        use(model, {"blocks.1.attention": 0.5})
        stored.seek(0)
        got, _ = model(tokens(2, 1), torch.load(stored, weights_only=True))
    assert_same(got, wanted)
