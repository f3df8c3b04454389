"""Compiled regions are kept on disk by Inductor: safe under two processes at once, and never used when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adaskip_compile.capture.package import why_not
from tests.tiny_checkpoints import save_tiny

# Ids of greedy tokens, how many regions were compiled in this process, and how many of them came from the disk.
PROGRAM = """
import json, sys, torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
import adaskip_compile
from adaskip_compile import SkipPlan

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
adaskip_compile.compile(model, SkipPlan.none())
ids = model.generate(torch.arange(3, 20)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
found = counters["inductor"]
print(json.dumps([ids.tolist(), found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]]))
"""


def start(checkpoint: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, str(checkpoint)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> tuple[list[list[int]], int, int]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return tuple(json.loads(out.splitlines()[-1]))


def damage(folder: Path) -> int:
    """Cut every kept graph in half; return how many there were."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent.parent.parent.name == "fxgraph"]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return len(files)


@pytest.mark.skipif(why_not() is not None, reason="captures are kept where every process has the same graphs")
@pytest.mark.slow
def test_kept_kernels_are_shared_and_damaged_ones_are_compiled_again(tmp_path):
    checkpoint = save_tiny(tmp_path / "model", num_hidden_layers=2)
    both = [start(checkpoint, tmp_path / "kernels") for _ in range(2)]
    (tokens, compiled, found), (other, *_) = (result(process) for process in both)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    eager = model.generate(
        torch.arange(3, 20)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert tokens == other == eager.tolist()
    assert compiled + found > 0

    warm, misses, hits = result(start(checkpoint, tmp_path / "kernels"))
    assert (warm, misses) == (tokens, 0)
    assert hits == compiled + found

    assert damage(tmp_path / "kernels") >= hits
    mended, misses, hits = result(start(checkpoint, tmp_path / "kernels"))
    assert mended == tokens
    # A prompt's last layer runs for its last row, as a decoded token does: its FFN is compiled once for both.
    assert (misses > 0, hits) == (True, 1)
