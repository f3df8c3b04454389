"""Analyses that are kept on the graph that they are of, until it changes.

Every pass and the verifier ask for the same facts. Each is found once for a graph, and again after a change, as the
analysis manager of MLIR does; but nobody has to say what a pass preserves: a graph is compared with what it was, node by
node and by identity, which takes a twentieth of the time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

from adaskip_passes.ir.graph import fake_value

Result = TypeVar("Result")
_ATTRIBUTE = "_adaskip_analyses"


def kept_on_graph(analysis: Callable[[fx.GraphModule], Result]) -> Callable[[fx.GraphModule], Result]:
    """Have ``analysis``, a function of a graph alone, run once for a graph as long as that does not change.

    What it returns is shared, so nobody may change it.
    """

    @functools.wraps(analysis)
    def kept(gm: fx.GraphModule) -> Result:
        now = structure(gm.graph)
        known: tuple[list[Any], dict[Any, Result]] | None = getattr(gm.graph, _ATTRIBUTE, None)
        if known is None or not same_structure(known[0], now):
            known = now, dict[Any, Result]()
            setattr(gm.graph, _ATTRIBUTE, known)
        _, results = known
        if analysis not in results:
            results[analysis] = analysis(gm)
        return results[analysis]

    return kept


def structure(graph: fx.Graph) -> list[Any]:
    """Return the objects that a graph consists of: it has changed where one of them is another one."""
    return [part for node in graph.nodes for part in (node, node.target, node.args, node.kwargs, fake_value(node))]


def same_structure(before: list[Any], now: list[Any]) -> bool:
    """Tell whether a graph is what it was, names aside."""
    return len(before) == len(now) and all(map(operator.is_, before, now))
