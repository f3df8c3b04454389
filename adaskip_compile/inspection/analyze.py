"""Show what the compiler sees of a model, without compiling anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.capture.graph_breaks import GraphBreaks
from adaskip_compile.files.model_identity import unwrapped
from adaskip_passes.errors import CaptureError
from adaskip_passes.ir.module_paths import naming
from adaskip_passes.pipelines import canonicalised
from adaskip_passes.stream.stream import ResidualStream


def analyze(model: nn.Module, **example_inputs: Any) -> ResidualStream:
    """Return the residual stream of ``model`` as captured from one forward on ``example_inputs``.

    ``.problems`` says why where no stream was found; :func:`capture_graph` tells what the inputs are, and what is raised.
    """
    return capture_graph(model, **example_inputs)[1]


def capture_graph(model: nn.Module, **example_inputs: Any) -> tuple[fx.GraphModule, ResidualStream]:
    """Return the graph of one forward of ``model`` on ``example_inputs``, as passes get it, and its residual stream.

    Without inputs, eight random token ids ``(1, 8)`` are tried as ``input_ids``. The forward really
    runs, once, on the model's device; a model on the meta device costs nothing.

    Raises:
        CaptureError: The forward was captured in several pieces, or in none.
    """
    model = unwrapped(model)
    graphs: list[fx.GraphModule] = []
    runs: list[fx.GraphModule] = []
    breaks = GraphBreaks()

    def record(gm: fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(gm)

        def run(*values: Any) -> Any:
            runs.append(gm)
            return gm.forward(*values)

        return run

    if not example_inputs:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        example_inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long, device=device)}

    def forward(inputs: dict[str, Any]) -> Any:
        return model._call_impl(**inputs)

    compiled = torch.compile(forward, backend=naming(model, record), dynamic=True)
    with torch.no_grad():
        compiled(example_inputs)
    # One graph that runs many times is that of a layer, behind a graph break in each.
    if len(runs) != 1:
        raise CaptureError(
            f"the forward was captured in {len(runs)} pieces, and an analysis needs one graph; {breaks.first()}"
        )
    straight = canonicalised(graphs[0])
    return straight.gm, straight.stream
