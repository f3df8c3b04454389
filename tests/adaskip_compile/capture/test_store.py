"""Captures that are kept serve the next process, and never a call that they are not right for."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.capture import store
from adaskip_compile.capture.dynamo import capture_count
from adaskip_compile.capture.package import why_not
from adaskip_compile.runtime.session import sessions_of
from tests.generation import generate, make_cache
from tests.models import tiny, tokens
from tests.tiny_checkpoints import save_tiny

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"captures are not kept: {why_not()}")

PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import adaskip_compile
from adaskip_compile.capture.dynamo import capture_count

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
plan = adaskip_compile.SkipPlan.from_scales(json.loads(sys.argv[2]), window=0)
adaskip_compile.compile(model, plan, inner="eager")
ids = [
    model.generate(
        torch.arange(3, 3 + length).expand(rows, length), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )[:, length:].tolist()
    for rows in json.loads(sys.argv[3])
    for length in (17, 29)
]
restored = [graph.restored for graph in adaskip_compile.report(model).sessions[0].graphs]
print(json.dumps([ids, capture_count(), restored]))
"""


def in_new_process(checkpoint: Path, cache_dir: Path, scales: dict[str, float], rows: tuple[int, ...] = (1,)) -> Any:
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), json.dumps(scales), json.dumps(rows)]
    environment = {**os.environ, "ADASKIP_CACHE_DIR": str(cache_dir)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def captures_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.capture"))


@pytest.mark.slow
def test_the_next_process_captures_nothing(tmp_path: Path):
    checkpoint = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    eager = [
        generate(model, torch.arange(3, 3 + length)[None], torch.ones(1, length, dtype=torch.long), 6).tolist()
        for length in (17, 29)
    ]
    first, captured, restored = in_new_process(checkpoint, tmp_path / "cache", {})
    assert captured == len(captures_in(tmp_path)) == 2
    assert restored == [False, False]
    second, captured, restored = in_new_process(checkpoint, tmp_path / "cache", {})
    assert (captured, restored) == (0, [True, True])
    assert first == second == eager
    # Another plan needs no other graphs.
    skipped, captured, _ = in_new_process(checkpoint, tmp_path / "cache", {"model.layers.0.self_attn": 1.0})
    assert captured == 0
    assert skipped != second
    # What is not kept yet is captured beside what is.
    both, captured, restored = in_new_process(checkpoint, tmp_path / "cache", {}, rows=(1, 2))
    assert captured == len(restored) - 2 == len(captures_in(tmp_path)) - 2 > 0
    assert both == [*eager, *([one[0], one[0]] for one in eager)]


def run(model: Any, cache: str = "dynamic", length: int = 12) -> list[int]:
    ids = tokens(1, length, vocabulary=100)
    return generate(model, ids, torch.ones_like(ids), 4, cache=make_cache(cache, model))[0].tolist()


def captured_by(work: Any) -> tuple[Any, int]:
    before = capture_count()
    return work(), capture_count() - before


FAMILIES = ["llama", "gpt2", "gemma3_text", "qwen3_moe", "mixtral", "gpt_neox", "cohere", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_model_of_the_same_structure_needs_no_captures(family: str, cache_dir: Path):
    first, second = tiny(family, seed=1), tiny(family, seed=2)
    expected = run(first), run(second)
    adaskip_compile.compile(first, SkipPlan.none(), inner="eager")
    found, captured = captured_by(lambda: run(first))
    assert (found, captured) == (expected[0], len(captures_in(cache_dir)))
    adaskip_compile.compile(second, SkipPlan.none(), inner="eager")
    assert captured_by(lambda: run(second)) == (expected[1], 0)
    assert all(graph.restored for graph in sessions_of(second)[0].graphs)


def test_graphs_of_a_static_cache_are_kept_beside_those_of_a_growing_one(cache_dir: Path):
    first, second = tiny("llama", seed=1), tiny("llama", seed=2)
    expected = {cache: run(second, cache) for cache in ("dynamic", "static")}
    for cache in expected:
        adaskip_compile.compile(first, SkipPlan.none(), inner="eager")
        run(first, cache)
    adaskip_compile.compile(second, SkipPlan.none(), inner="eager")
    for cache, known in expected.items():
        assert captured_by(lambda cache=cache: run(second, cache)) == (known, 0)


def test_each_model_keeps_its_own_plan(cache_dir: Path):
    models = [tiny("llama", seed=3) for _ in range(2)]
    plans = [SkipPlan.none(), SkipPlan.from_scales({"model.layers.0.mlp": 0.7}, window=0)]
    for model, plan in zip(models, plans, strict=True):
        adaskip_compile.compile(model, plan, inner="eager")
    found = [[run(model) for model in models] for _ in range(2)]
    assert found[0] == found[1]
    skipped = [adaskip_compile.report(model).requests[-1].skipped for model in models]
    assert skipped == [{}, {"model.layers.0.mlp": 0.7}]


def test_a_model_that_something_else_compiles_is_not_given_them(cache_dir: Path):
    adaskip_compile.compile(first := tiny("llama", seed=1), SkipPlan.none(), inner="eager")
    run(first)
    adaskip_compile.compile(second := tiny("llama", seed=2), SkipPlan.none(), inner="eager")
    run(second)
    captured = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        captured.append(gm)
        return gm.forward

    third = tiny("llama", seed=2)
    third.compile(backend=backend, dynamic=True)
    assert run(third) == run(second)
    assert captured


def test_nothing_is_kept_where_that_is_not_wanted(cache_dir: Path):
    adaskip_compile.compile(model := tiny("llama"), SkipPlan.none(), inner="eager", keep_captures=False)
    run(model)
    assert not captures_in(cache_dir)


def test_nothing_is_kept_with_a_torch_that_was_not_tried(cache_dir: Path, monkeypatch: Any, caplog: Any):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    caplog.set_level("INFO", "adaskip_compile.capture.store")
    adaskip_compile.compile(model := tiny("llama"), SkipPlan.none(), inner="eager")
    run(model)
    assert not captures_in(cache_dir)
    assert "not tried with torch 2.99.0" in caplog.text


def restart(model: Any) -> Any:
    """Return a copy of ``model`` that is compiled with what is kept."""
    again = tiny("llama", seed=1)
    again.load_state_dict(model.state_dict())
    adaskip_compile.compile(again, SkipPlan.none(), inner="eager")
    return again


@pytest.fixture
def kept(cache_dir: Path) -> tuple[Any, list[Path]]:
    adaskip_compile.compile(model := tiny("llama", seed=1), SkipPlan.none(), inner="eager")
    run(model)
    files = captures_in(cache_dir)
    assert len(files) == 2
    return model, files


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def open_to_others(file: Path) -> None:
    file.chmod(0o666)


@pytest.mark.parametrize("spoil", [cut, open_to_others])
def test_a_file_that_cannot_be_trusted_is_passed_over(kept: tuple[Any, list[Path]], spoil: Any, caplog: Any):
    model, files = kept
    for file in files:
        spoil(file)
    again = restart(model)
    assert captured_by(lambda: run(again)) == (run(model), 2)
    assert "passed over" in caplog.text


def test_captures_are_readable_by_their_owner_alone(kept: tuple[Any, list[Path]]):
    for file in kept[1]:
        assert file.parent.stat().st_mode & 0o077 == 0


def test_a_kept_graph_that_cannot_be_taken_up_is_captured_again(kept: tuple[Any, list[Path]], monkeypatch: Any):
    model, _ = kept
    real = store.read_graph

    def missing(graph: dict[str, Any], **how: Any) -> Any:
        text = json.dumps(graph).replace("scaled_dot_product_attention", "no_such_operation")
        return real(json.loads(text), **how)

    again = restart(model)
    monkeypatch.setattr(store, "read_graph", missing)
    assert captured_by(lambda: run(again))[0] == run(model)
    assert any("captured again" in note for note in adaskip_compile.report(again).sessions[0].notes)


@pytest.mark.slow
def test_kernels_of_a_captured_graph_serve_the_kept_one(cache_dir: Path, monkeypatch: Any):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / "inductor"))
    first, second = tiny("llama", seed=1), tiny("llama", seed=2)
    expected = run(second)
    lowered = []
    for model in (first, second):
        adaskip_compile.compile(model, SkipPlan.none())
        before = counters["inductor"]["fxgraph_cache_miss"]
        found = run(model)
        lowered.append(counters["inductor"]["fxgraph_cache_miss"] - before)
    assert found == expected
    assert all(graph.restored for graph in sessions_of(second)[0].graphs)
    assert lowered[0] > lowered[1] == 0


MODULE = """
import torch

def widen(x):
    return {factor} * x

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(16), torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(widen(self.up(self.norm(x)))))

class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes a module with a decoder, and imports it as a new process would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "own_decoder.py"

    def write(factor: float, comment: str = "") -> Any:
        file.write_text(MODULE.format(factor=factor) + comment)
        seconds = 1e9 * factor + len(comment)
        os.utime(file, (seconds, seconds))  # or the bytecode of the file before might be taken for its own
        sys.modules.pop("own_decoder", None)
        importlib.invalidate_caches()
        return importlib.import_module("own_decoder")

    yield write
    sys.modules.pop("own_decoder", None)


@torch.no_grad()
def compiled_and_eager(module: Any) -> tuple[int, bool]:
    """Return how many graphs a new decoder of ``module`` captures, and whether it computes what it does eagerly."""
    model, ids = module.Decoder().eval(), tokens(1, 8, vocabulary=64)
    eager = model(ids)
    adaskip_compile.compile(model, SkipPlan.none(), inner="eager")
    found, captured = captured_by(lambda: model(ids))
    return captured, torch.allclose(found, eager)


def test_a_file_of_the_model_that_has_changed_is_traced_again(own_module: Any, cache_dir: Path):
    assert compiled_and_eager(own_module(1.0)) == (1, True)
    assert compiled_and_eager(own_module(1.0)) == (0, True)
    assert compiled_and_eager(own_module(2.0)) == (1, True)
    # Whatever it is that has changed.
    assert compiled_and_eager(own_module(2.0, "# This may mean something.")) == (1, True)


def test_a_function_that_is_replaced_is_traced_again(own_module: Any, cache_dir: Path, monkeypatch: Any):
    assert compiled_and_eager(own_module(1.0)) == (1, True)
    module = own_module(1.0)
    # Replaced before the capture is installed: it is not what was captured.
    monkeypatch.setattr(module, "widen", lambda x: 3 * x)
    assert compiled_and_eager(module) == (1, True)
    # Replaced afterwards: its guard fails.
    module = own_module(1.0)
    model, ids = module.Decoder().eval(), tokens(1, 8, vocabulary=64)
    adaskip_compile.compile(model, SkipPlan.none(), inner="eager")
    with torch.no_grad():
        assert captured_by(lambda: model(ids))[1] == 0
        monkeypatch.setattr(module, "widen", lambda x: 4 * x)
        found = model(ids)
        model._compiled_call_impl = None
        assert torch.allclose(found, model(ids))


def test_what_an_older_version_pickled_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = b"cadaskip_compile.kept_captures\nKeptCapture\n."  # a class by a module that has moved
    folder = tmp_path / "captures"
    folder.mkdir(mode=0o700)
    (folder / "old.capture").write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    assert list(store.CaptureFolder(folder).read()) == []
    assert "old.capture is passed over, and the graph captured again: No module named" in caplog.text
