"""Remove what nothing needs, and keep every effect that someone may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class EliminateDeadCode:
    """Remove nodes that reach neither an output nor an effect. Inputs stay, used or not.

    A write stays if the memory belongs to the caller, or if a later node that stays reads it.
    ``torch.fx``'s own dead-code elimination takes ``index_copy_`` for pure and would lose the cache.

    >>> import torch
    >>> from adaskip_passes.ir.printer import print_graph
    >>> def f(cache, x):
    ...     scratch = torch.zeros_like(x)
    ...     scratch.add_(x)
    ...     cache.copy_(x)
    ...     return x + 1
    >>> gm = fx.symbolic_trace(f)
    >>> EliminateDeadCode().apply(gm, ResidualStream(())).matched
    2
    >>> print(print_graph(gm))
    %cache = placeholder
    %x = placeholder
    %copy_ = .copy_(%cache, %x)
    %add = operator.add(%x, 1)
    output(%add)
    """

    name: ClassVar[str] = "eliminate-dead-code"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Remove the dead nodes of ``gm``; ``matched`` counts them."""
        dead = _dead_nodes(gm)
        for node in dead:
            gm.graph.erase_node(node)
        return PassResult(stream.within(gm.graph), bool(dead), len(dead))


def _dead_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes to remove, users before what they use."""
    effects = find_effects(gm)
    written = effects.written()
    live: set[fx.Node] = set()
    read: set[fx.Node] = set()
    dead = []
    for node in reversed(gm.graph.nodes):
        outlives = any(root.op in ("placeholder", "get_attr") or root in read for root in written.get(node, ()))
        if node.op in ("placeholder", "output") or node in live or node in effects.checks or outlives:
            live.update(node.all_input_nodes)
            read.update(effects.roots[source] for source in node.all_input_nodes)
        else:
            dead.append(node)
    return dead
