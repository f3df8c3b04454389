"""Admit captured graphs to a session: as what it may skip in, or to run in full, with the reason why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from adaskip_compile.capture.cache_object import CachePlace, find_cache_place
from adaskip_compile.capture.dynamo import Place, graph_break, place_in
from adaskip_compile.runtime.dispatch import Dispatcher
from adaskip_compile.runtime.session import Session
from adaskip_passes.errors import CaptureError, PassError
from adaskip_passes.ir.module_paths import held_by_module, name_modules
from adaskip_passes.ir.plain_tensors import other_layout
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from adaskip_passes.pipelines import CANONICALISE

log = logging.getLogger(__name__)


def admit(
    session: Session, gm: fx.GraphModule, inputs: list[Any], place: Place | None = None, *, guard: bool = False
) -> Callable[..., Any]:
    """Return what Dynamo shall call in place of a graph that it captured of the model of ``session``.

    Args:
        session: The session.
        gm: The graph.
        inputs: What it is called with, in order.
        place: Where in the model it lies, where ``gm`` is not the very graph that Dynamo made.
        guard: Have it serve this model alone: where Dynamo takes the backend of another one for the same.
    """
    if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
        return _refuse(session, gm, inputs, "gradients are needed: runs unskipped; call it under torch.no_grad()")
    layout = other_layout(inputs)
    if layout is not None:
        return _refuse(session, gm, inputs, f"an input is a tensor of layout {layout}, without strides: runs unskipped")
    place = place or place_in(session.module, gm, inputs)
    name_modules(gm, inputs, session.module)
    try:
        graph = _canonical(session, gm)
    except PassError as error:
        return _refuse(session, gm, inputs, f"it has no canonical form: {error}; runs unskipped")
    stream = graph.stream
    problem = "; ".join(stream.problems) or _shared(place)
    if problem:
        stop = graph_break(gm)
        why = f"capture broke the forward in pieces: {stop}" if stop else problem
        return _refuse(session, graph.gm, inputs, f"no residual stream: {why}; runs unskipped")
    if guard:
        place.guard()
    log.info("%s: captured a %s graph of %d sublayers", session.model_name, stream.phase, len(stream.sublayers))
    with session.lock:
        if session.graphs and session.graphs[0].stream.paths != stream.paths:
            missing = sorted({*session.graphs[0].stream.paths} ^ {*stream.paths})
            return _refuse(
                session,
                graph.gm,
                inputs,
                f"a graph has other sublayers than the first one ({missing[0]}); it runs unskipped",
            )
        dispatcher = Dispatcher(session, graph)
        session.graphs.append(dispatcher)
    return dispatcher


def restore_graph(session: Session, gm: fx.GraphModule, place: CachePlace | None) -> Dispatcher:
    """Take up a graph that an earlier process captured, with the names that it had there.

    ``place`` is where its cache objects are.

    Raises:
        CaptureError: It has no residual stream, or other sublayers than the session's graphs.
    """
    graph = _canonical(session, gm)
    stream = graph.stream
    if stream.problems or (session.graphs and session.graphs[0].stream.paths != stream.paths):
        raise CaptureError("; ".join(stream.problems) or "it has other sublayers than the others")
    dispatcher = Dispatcher(session, graph, restored=True, place=place)
    with session.lock:
        session.graphs.append(dispatcher)
    return dispatcher


def _canonical(session: Session, gm: fx.GraphModule) -> DerivedGraph:
    return DerivedGraph.captured(gm, session.options.debug_dir, session.model_name).run(CANONICALISE)


def _shared(place: Place) -> str | None:
    """Tell of a piece of a broken forward that it is no one part of the model, or return None.

    Weights are inputs of a graph: Dynamo runs what it captured of one layer for all of them.
    """
    if place.root is None or place.module is place.root:
        return None
    if place.module is None:
        return "it is the rest of a function behind a graph break" if place.resumed else None
    alike = sum(type(module) is type(place.module) for module in place.root.modules())
    return f"it is a piece of each of the {alike} {type(place.module).__name__}s" if alike > 1 else None


def _refuse(session: Session, gm: fx.GraphModule, inputs: list[Any], reason: str) -> Callable[..., Any]:
    if session.options.passes:
        reason += "; passes= are left out"
    session.note(reason)
    session.unskipped.append(reason)
    run = gm.forward
    inner = session.options.inner
    if inner != "eager" and other_layout(inputs) is None:  # Inductor reads by strides
        compile_graph = inner if callable(inner) else torch._dynamo.lookup_backend(inner)
        run = compile_graph(gm, inputs)

    place = find_cache_place(node for node in gm.graph.find_nodes(op="placeholder") if not held_by_module(node))

    def unskipped(*values: Any) -> Any:
        objects = [] if place is None else place.objects()
        owner = session.requests.look_up(objects, [value for value in values if isinstance(value, torch.Tensor)])
        if owner is not None:
            owner.check(frozenset(), because=reason)
        return run(*values)

    return unskipped
