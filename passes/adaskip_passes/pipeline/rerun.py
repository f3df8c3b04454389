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
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from adaskip_passes.pipeline.pipeline import Pass, PassResult, parse_pass, run_pipeline
from adaskip_passes.stream.stream import NO_STREAM

__all__ = ["rerun"]


def rerun(file: str | Path, pipelines: Sequence[Sequence[str]], known: Sequence[type[Any]]) -> int:
    """Run ``pipelines`` of passes, given as texts, on the captured graph in ``file``, and print what each pass changed.

    Returns:
        0, or 1 where a pass fails or the last graph is not the one whose text lies beside ``file``.
    """
    gm, stream = read_graph(json.loads(Path(file).read_text("utf-8"))), NO_STREAM
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
        for passes in pipelines:
            items = [parse_pass(one, known) for one in passes]
            graph = DerivedGraph(gm, stream)
            for item in items:
                if least := getattr(item, "least_rows", 0):
                    graph = graph.for_rows(least, getattr(item, "fewest_rows", least))
            result = run_pipeline(graph.gm, graph.stream, items, [show], on_failure=show_failure)
            gm, stream = result.gm, result.stream
    except AdaSkipError:
        return 1
    wanted = max(Path(file).parent.glob("[0-9][0-9]-*.txt"))
    difference = diff_graphs(wanted.read_text("utf-8").rstrip("\n"), text)
    if difference:
        sys.stderr.write(f"the last graph is not that of {wanted.name}:\n{difference}\n")
        return 1
    _say(f"# the last graph is that of {wanted.name}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n" if text else "")
