"""Captured graphs that many tests read, made once a process: capturing is what tests of passes spend their time on.

Never change one. Passes work on the copies that ``run_pipeline`` makes, or on one of ``copy_graph``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream
from tests.models import Captured, capture_all, plain, tiny
from tests.reference import InterpreterReference
from tests.rewriting import applied

LAYERS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {"num_hidden_layers": 3},
    "qwen3_moe": {"num_hidden_layers": 2},
}


@functools.cache
def shared_captures(name: str, cache: str = "dynamic") -> tuple[Captured, ...]:
    """Return the prefill and decode graphs of a model, straightened, with its floats held constant, as the backend does.

    Prompts are of 20 tokens and more, longer than a sliding window. With ``cache="static"`` there are two
    prefill graphs: the first makes the cache, the second is given it.
    """
    with torch._dynamo.config.patch(specialize_float=True):
        if name == "plain":
            captured = capture_all(plain(layers=6, cached=True))
        else:
            requests = 2 if cache == "static" else 1
            captured = capture_all(tiny(name, **LAYERS[name]), cache=cache, length=20, requests=requests)
    for one in captured:
        applied(StraightenStream(), one.gm)
    return tuple(captured)


@functools.cache
def stream_of(gm: fx.GraphModule) -> ResidualStream:
    """Return the residual stream of a shared graph."""
    return find_residual_stream(gm)


@dataclass(frozen=True)
class Run:
    """What a graph returned, and its inputs as it left them."""

    outputs: tuple[Any, ...]
    inputs: tuple[Any, ...]


def run(function: Callable[..., Any], captured: Captured, *more: Any) -> Run:
    """Run ``function`` on copies of the inputs that ``captured`` got, then ``more``."""
    inputs = tuple(
        value.clone() if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) else value
        for value in captured.inputs
    )
    with torch.no_grad():
        return Run(tuple(function(*inputs, *more)), inputs)


def run_reference(captured: Captured, scales: Mapping[str, float]) -> Run:
    """Run ``captured`` in the interpreter that skips the sublayers in ``scales`` (path to scale)."""
    skipped = [stream_of(captured.gm).by_path(path) for path in scales]
    skips = {one.stream_out.name: (scales[one.path], one.stream_in.name) for one in skipped}
    return run(InterpreterReference(captured.gm, skips).run, captured)


def scales_input(stream: ResidualStream, scales: Mapping[str, float]) -> torch.Tensor:
    """Return what ``SkipSublayers`` wants as its last input; NaN for sublayers that are kept and must not read it."""
    return torch.tensor([scales.get(path, float("nan")) for path in stream.paths])


def first_graph(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> fx.GraphModule:
    """Return the graph that Dynamo captures from ``function``."""
    graphs = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return graphs[0]
