"""Passes applied by tests to a graph of their own."""

from __future__ import annotations

from torch import fx

from adaskip_passes.pipeline.pipeline import Pass
from adaskip_passes.stream.stream import NO_STREAM


def applied(item: Pass, gm: fx.GraphModule) -> int:
    """Apply a pass that needs no stream to ``gm`` itself, and return how many places matched."""
    found = item.apply(gm, NO_STREAM)
    gm.graph.lint()
    gm.recompile()
    return found.matched
