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

from adaskip_compile.cli.measure import Spread


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
