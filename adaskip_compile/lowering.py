"""Turn a specialised graph into something that runs: the one place that knows the inner compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from adaskip_compile.capture import example_inputs

Runnable = Callable[..., Any]


def lower(gm: fx.GraphModule, inner: str) -> Runnable:
    """Compile ``gm`` with the inner backend ``"inductor"`` or ``"eager"``; call the result as ``gm`` itself.

    It may be called long after Dynamo's capture has ended, so everything it needs is read from the
    fake values that the graph carries.
    """
    if inner == "eager":
        return gm.forward
    return _lower_whole(gm)


def _lower_whole(gm: fx.GraphModule) -> Runnable:
    from torch._inductor import standalone_compile

    return standalone_compile(gm, example_inputs(gm), dynamic_shapes="from_graph", options={})
