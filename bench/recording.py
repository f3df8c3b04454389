"""What all benches share: the circumstances of a run, numbers with their spread, and where results go."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.evaluation.timing import Generation, Spread, generate
from adaskip_compile.planning.skip_plan import SkipPlan

_DTYPES = ("float32", "bfloat16")


def bench_parser(description: str, *, both_dtypes: bool = False, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser of what every bench of generation takes, and of ``--context`` and ``--rounds`` where they have defaults.

    A bench takes one ``--dtype``, and with ``both_dtypes`` a list of them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id or short name")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    several: dict[str, Any] = {"nargs": "+", "default": list(_DTYPES)} if both_dtypes else {"default": _DTYPES[0]}
    parser.add_argument("--dtype", choices=_DTYPES, **several)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--json", metavar="PATH|-")
    return parser


def generate_under(model: Any, ids: torch.Tensor, plan: SkipPlan, arguments: argparse.Namespace) -> Generation:
    """Generate ``--new-tokens`` after ``ids`` under ``plan``."""
    adaskip_compile.compile(model, plan, inner=arguments.inner)
    return generate(model, ids, arguments.new_tokens)


def generate_eagerly(model: Any, ids: torch.Tensor, new_tokens: int) -> Generation:
    """Generate ``new_tokens`` after ``ids`` with the model as it comes, whatever it was compiled to."""
    with torch.compiler.set_stance("force_eager"):
        return generate(model, ids, new_tokens)


def circumstances(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, the versions and the arguments of a run."""
    return {
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: value for name, value in vars(arguments).items() if name != "json"},
    }


def numbers(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and greatest of repeated measurements."""
    spread = Spread.of(values)
    return round(spread.median, 5), round(spread.low, 5), round(spread.high, 5)


def ratios(before: Sequence[Generation], after: Sequence[Generation], phase: str) -> tuple[float, float, float]:
    """Return how many times as fast ``after`` is as ``before`` in ``phase``, the ratios taken within each round."""
    pairs = zip(before, after, strict=True)
    return numbers([first.seconds(phase) / second.seconds(phase) for first, second in pairs])


def cell(found: Sequence[float], factor: float = 1, digits: int = 2) -> str:
    """Return what :func:`numbers` found as the cell of a table, each number times ``factor``."""
    median, low, high = (f"{value * factor:.{digits}f}" for value in found)
    return f"{median} ({low} to {high})"


def write(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write results as JSON where ``--json`` says: a file, or ``-`` for standard output."""
    if not arguments.json:
        return
    text = json.dumps({**circumstances(arguments), **results}, indent=1) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        Path(arguments.json).write_text(text)
