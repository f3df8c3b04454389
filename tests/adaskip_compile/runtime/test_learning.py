"""Where it is asked for: a process learns, specialises, and leaves what it learned to the next one. Otherwise nothing is skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import Profile
from adaskip_compile.planning.policies import largest_skip
from tests.models import tiny, tokens
from tests.reference import hook_statistics, omit_sublayers
from tests.tiny_checkpoints import save_tiny

# What a user writes; the package is imported only when all is over, to read the report.
PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
compiled = torch.compile(model, backend="adaskip", options={"learn": 20})
with torch.no_grad():
    for length in range(9, 9 + int(sys.argv[2])):
        compiled(torch.arange(3, 3 + length)[None])

import adaskip_compile
print(json.dumps(adaskip_compile.report(model).to_dict()))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=6)


def run(checkpoint: Path, requests: int, folder: Path) -> dict:
    """Return the only session's report of a fresh process that serves ``requests`` prompts."""
    environment = {**os.environ, "ADASKIP_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [session] = json.loads(done.stdout.splitlines()[-1])["sessions"]
    return session


def test_a_process_learns_and_the_next_one_starts_specialised(checkpoint, tmp_path):
    short = run(checkpoint, 2, tmp_path)
    assert short["state"] == "learning"
    assert short["learned_requests"] == 2
    assert not list(tmp_path.rglob("*.json")), "two requests are not enough to remember"

    first = run(checkpoint, 21, tmp_path)
    assert first["state"] == "specialised"
    assert first["notes"] == ["learned from 20 requests: new requests skip 8 sublayers"]
    assert [request["learning"] for request in first["requests"]] == [True] * 20 + [False]
    assert [len(request["skipped"]) for request in first["requests"]] == [0] * 20 + [8]
    [file] = tmp_path.rglob("*.json")

    second = run(checkpoint, 1, tmp_path)
    assert second["state"] == "specialised"
    assert second["notes"] == [f"starts specialised: learned earlier from 20 requests ({file})"]
    assert second["requests"][0]["skipped"] == first["requests"][-1]["skipped"]


@pytest.mark.parametrize("door", ["adaskip_compile.compile", "model.compile", "torch.compile"])
def test_no_door_skips_what_nobody_asked_it_to(door, tmp_path):
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=3)
    options: dict[str, Any] = {"inner": "eager", "cache_dir": str(tmp_path)}
    eager = [model(tokens(1, 9, seed=seed)).logits for seed in range(25)]
    call = model
    if door == "adaskip_compile.compile":
        adaskip_compile.compile(model, **options)
    elif door == "model.compile":
        model.compile(backend="adaskip", options=options)
    else:
        call = torch.compile(model, backend="adaskip", options=options)
    with torch.no_grad():
        for seed, wanted in enumerate(eager):
            torch.testing.assert_close(call(tokens(1, 9, seed=seed)).logits, wanted)
    [session] = adaskip_compile.report(model).sessions
    assert not any(request.skipped or request.prompt_skipped for request in session.requests)
    [note] = session.notes
    assert note.startswith("nothing is skipped: there is neither a plan nor a profile; ")


def compiled(cache_dir: Path, **options):
    """Return a tiny model that learns from two requests, and a call that makes a request of it."""
    model = tiny("llama", num_hidden_layers=3)
    adaskip_compile.compile(model, learn=2, inner="eager", cache_dir=cache_dir, **options)

    @torch.no_grad()
    def request(seed: int) -> torch.Tensor:
        return model(tokens(1, 9, seed=seed)).logits

    return model, request


def test_learning_requests_run_in_full_and_later_ones_skip(tmp_path):
    model, request = compiled(tmp_path, skip=2)
    plain = tiny("llama", num_hidden_layers=3)
    for seed in range(2):
        torch.testing.assert_close(request(seed), plain(tokens(1, 9, seed=seed)).logits, rtol=1e-5, atol=1e-5)
    got = request(2)
    skipped = adaskip_compile.report(model).requests[-1].skipped
    assert len(skipped) == 2
    with omit_sublayers(plain, skipped):
        torch.testing.assert_close(got, plain(tokens(1, 9, seed=2)).logits, rtol=2e-5, atol=2e-5)


def test_what_is_learned_is_what_hooks_measure(tmp_path):
    _, request = compiled(tmp_path, skip=1)
    plain = tiny("llama", num_hidden_layers=3)
    with hook_statistics(plain) as calls, torch.no_grad():
        for seed in range(2):
            request(seed)
            plain(tokens(1, 9, seed=seed))
    [file] = tmp_path.rglob("*.json")
    learned = Profile.load(file)
    for sublayer in learned.sublayers:
        for name in ("similarity", "scale_token", "scale_frobenius"):
            wanted = [getattr(call[sublayer.path], name) for call in calls]
            assert getattr(sublayer, name) == pytest.approx(wanted, abs=1e-5)
        assert sublayer.tokens == (9, 9)


@pytest.mark.parametrize(("asked", "said"), [({}, "skip=8 is too many"), ({"speedup": 20.0}, "speedup=20.0 skips 6")])
def test_a_model_too_small_for_the_options_skips_what_it_can(tmp_path, asked, said):
    model, request = compiled(tmp_path, **asked)
    for seed in range(3):
        request(seed)
    session = adaskip_compile.report(model).sessions[0]
    most = largest_skip(Profile.load(next(tmp_path.rglob("*.json"))))
    assert len(session.requests[-1].skipped) == most < 8
    assert session.notes[0].startswith(said)
    assert session.notes[0].endswith(f"; skips {most}")
    # The next session plans from what is remembered, under the same options.
    again, _ = compiled(tmp_path, **asked)
    assert adaskip_compile.report(again).sessions[0].notes[0] == session.notes[0]


@pytest.mark.parametrize(
    "damage", [lambda text: text[:100], lambda text: text.replace('"ffn"', '"fnf"')], ids=["cut", "changed"]
)
def test_a_damaged_memory_is_learned_again(tmp_path, damage):
    _, request = compiled(tmp_path, skip=1)
    request(0), request(1)
    [file] = tmp_path.rglob("*.json")
    whole = file.read_text()
    file.write_text(damage(whole))
    model, request = compiled(tmp_path, skip=1)
    assert adaskip_compile.report(model).sessions[0].state == "learning"
    request(0), request(1)
    assert file.read_text() == whole


def test_too_few_remembered_requests_do_not_count(tmp_path):
    _, request = compiled(tmp_path, skip=1)
    request(0), request(1)
    model = tiny("llama", num_hidden_layers=3)
    adaskip_compile.compile(model, learn=3, skip=1, inner="eager", cache_dir=tmp_path)
    assert adaskip_compile.report(model).sessions[0].state == "learning"


def test_a_model_of_other_weights_learns_for_itself(tmp_path):
    _, request = compiled(tmp_path, skip=1)
    request(0), request(1)
    other = tiny("llama", num_hidden_layers=3, seed=7)
    adaskip_compile.compile(other, learn=2, skip=1, inner="eager", cache_dir=tmp_path)
    assert adaskip_compile.report(other).sessions[0].state == "learning"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    model, request = compiled(blocked, skip=1)
    request(0), request(1), request(2)
    session = adaskip_compile.report(model).sessions[0]
    assert session.state == "specialised"
    assert session.notes[0].startswith("what was learned is not kept for the next process: ")
    assert len(session.requests[-1].skipped) == 1
