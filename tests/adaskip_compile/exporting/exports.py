"""Exports that several tests read, made once a process, and how to run them where there is PyTorch alone."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import adaskip_compile
from adaskip_compile import ExportedGraphs, SkipPlan
from tests.generation import generate
from tests.models import tiny, tokens

STEPS = 64
PROMPT = 21  # longer than a sliding window of the tiny models

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "tie_word_embeddings": False},
    "qwen3_moe": {},
    "gpt_neox": {},
}

# What `pip install torch` brings, and nothing else: numpy is none of it, but what setuptools carries inside is.
_ALONE = """
import runpy, sys
ALLOWED = {"torch", "torchgen", "functorch", "triton", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx",
           "sympy", "typing_extensions", "setuptools", "_distutils_hack", "packaging", *sys.stdlib_module_names}
class OnlyTorch:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        spec = self.finder.find_spec(name, path, target)
        known = name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata")
        vendored = spec is not None and "setuptools/_vendor" in str(spec.submodule_search_locations or spec.origin)
        return spec if known or vendored else None
sys.meta_path[:] = [OnlyTorch(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Exported:
    """An exported model, the plan in it, and what the model itself generates under that plan, and under none."""

    model: Any
    plan: SkipPlan
    graphs: ExportedGraphs
    ids: torch.Tensor
    wanted: torch.Tensor
    full: torch.Tensor


def model_of(family: str) -> Any:
    return tiny(family, num_hidden_layers=4, **FAMILIES[family])


def some_plan(model: Any) -> SkipPlan:
    """Return a plan that skips the first attention, which other caches count tokens in, another one, and an FFN."""
    paths = adaskip_compile.analyze(model).paths
    return SkipPlan.from_scales({paths[0]: 0.97, paths[3]: 1.05, paths[4]: 0.93})


@functools.cache
def exported(family: str) -> Exported:
    """Return an export of a tiny model with :func:`some_plan`; it stands in a folder of its own."""
    model = model_of(family)
    plan, ids = some_plan(model), tokens(1, PROMPT)
    full = generate(model, ids, torch.ones_like(ids), STEPS)
    adaskip_compile.compile(model, plan, inner="eager")
    wanted = generate(model, ids, torch.ones_like(ids), STEPS)
    assert set(adaskip_compile.report(model).requests[-1].skipped) == set(plan.paths)
    graphs = adaskip_compile.export(model, plan, _folder(family), max_length=96)  # a compiled model, too
    model._compiled_call_impl = None
    return Exported(model, plan, graphs, ids, wanted, full)


@functools.cache
def exported_in_full(family: str) -> ExportedGraphs:
    """Return an export of the same model that skips nothing."""
    return adaskip_compile.export(model_of(family), None, _folder(f"{family}-full"), max_length=96)


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="adaskip-exports-")


def _folder(name: str) -> Path:
    return Path(_root().name) / name


def run_alone(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a new process that can import the standard library, PyTorch and what that needs."""
    command = [sys.executable, "-I", "-c", _ALONE, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=script.parent)


def generate_alone(graphs: ExportedGraphs, ids: torch.Tensor, steps: int, *flags: str) -> torch.Tensor:
    """Return the ids ``(1, steps)`` that the exported ``generate.py`` prints, run by :func:`run_alone`."""
    result = run_alone(graphs.directory / "generate.py", *flags, "--new-tokens", steps, "--ids", *ids[0].tolist())
    assert result.returncode == 0, result.stderr
    return torch.tensor([[int(word) for word in result.stdout.split()]])
