"""Run a pipeline again on a graph that was saved: what the ``repro.py`` of a debug folder does.

It needs PyTorch and the passes; neither the model nor the library that it is of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx

from adaskip_passes.errors import AdaSkipError
from adaskip_passes.ir.printer import diff_graphs, print_graph
from adaskip_passes.ir.serializer import read_graph
from adaskip_passes.pipeline.pipeline import Pass, PassResult, parse_pass, run_pipeline
from adaskip_passes.stream.find_stream import find_residual_stream

__all__ = ["rerun"]


def rerun(file: str | Path, passes: Sequence[str], known: Sequence[type[Any]]) -> int:
    """Run ``passes``, given as texts, on the graph in ``file``; print what each changed. Return 1 if one fails, else 0."""
    gm = read_graph(json.loads(Path(file).read_text("utf-8")))
    text = print_graph(gm)

    def show(item: Pass, changed: fx.GraphModule, result: PassResult) -> None:
        nonlocal text
        before, text = text, print_graph(changed)
        _say(f"# {item.name}: {'modified' if result.modified else 'unchanged'}, matched {result.matched}")
        _say(diff_graphs(before, text))

    def show_failure(item: Pass, changed: fx.GraphModule, error: AdaSkipError) -> None:
        _say(f"# {item.name}: FAILED, and left this")
        _say(diff_graphs(text, print_graph(changed)))
        sys.stderr.write(f"{item.name} fails: {error}\n")

    try:
        run_pipeline(
            gm,
            find_residual_stream(gm),
            [parse_pass(one, known) for one in passes],
            [show],
            on_failure=show_failure,
        )
    except AdaSkipError:
        return 1
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n" if text else "")
