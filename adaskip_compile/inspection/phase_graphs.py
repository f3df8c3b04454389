"""The graphs of a model's phases, captured without its weights and without computing anything.

Structure and cost of a model follow from shapes alone. So its parameters are replaced by views of a single
zero, Dynamo captures what it would always capture, and in place of running a graph its outputs are made up in
the shapes that they would have. A model of any size is captured in the memory of its names.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaskip_compile.capture.dynamo import constant_floats
from adaskip_compile.capture.graph_breaks import GraphBreaks, why_not_captured
from adaskip_compile.checkpoints.model_config import longest_context, text_config
from adaskip_passes.errors import CaptureError
from adaskip_passes.ir.module_paths import naming
from adaskip_passes.pipelines import CANONICALISE, STRAIGHTEN, canonicalised
from adaskip_passes.stream.stream import Phase, ResidualStream

# A prompt longer than a sliding window tells its cache from that of full attention.
_PROMPT, _LONGEST_PROMPT = 20, 16_384
# What outputs hold is read only of small ones (logits, to choose a token): large ones stay untouched memory.
_LARGE = 1 << 22


@dataclass(frozen=True)
class PhaseGraph:
    """One phase of a model, ``"prefill"`` or ``"decode"``: its graph and the residual stream found in it."""

    phase: Phase
    gm: fx.GraphModule
    stream: ResidualStream


def capture_phases(model: nn.Module) -> tuple[PhaseGraph, ...]:
    """Return the prefill graph of ``model`` and, where it keeps a cache, the graph of a decode step.

    ``model`` may be on any device, the meta device included, and stays as it is. Nothing is computed.

    Raises:
        CaptureError: A forward was captured in several graphs, or could not be captured.
    """
    hollow = hollow_copy(model)
    recorder = _Recorder()
    call = constant_floats(torch.compile(hollow._call_impl, backend=naming(hollow, recorder), dynamic=True))
    try:
        with torch.no_grad():
            _run(hollow, recorder, call)
    except torch._dynamo.exc.TorchDynamoException as error:
        inner = getattr(error, "inner_exception", None)  # of an error that the backend itself raised
        if isinstance(inner, CaptureError):
            raise inner from error
        raise CaptureError(f"the model cannot be captured: {why_not_captured(error)}") from error
    on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
    return tuple(_phase_graph(gm, on_cpu) for gm in recorder.graphs)


def hollow_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the CPU, in eval mode, all of whose tensors are views of single zeros."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        hollow = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        memo[id(tensor)] = nn.Parameter(hollow, False) if isinstance(tensor, nn.Parameter) else hollow
    copied = copy.deepcopy(model, memo)
    copied._compiled_call_impl = None
    return copied.eval()


class _Recorder:
    """A Dynamo backend that keeps each graph, and in place of running it makes up its outputs."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.calls = self.runs = 0
        self._breaks = GraphBreaks()

    def __call__(self, gm: fx.GraphModule, _: list[Any]) -> Any:
        self.graphs.append(gm)
        self._require_one(len(self.graphs))
        return functools.partial(self._run, gm)

    def _run(self, gm: fx.GraphModule, *inputs: Any) -> Any:
        # One graph that runs many times a call is that of a layer, behind a graph break in each.
        self.runs += 1
        self._require_one(self.runs)
        return _made_up(gm, *inputs)

    def _require_one(self, pieces: int) -> None:
        if pieces > self.calls:
            raise CaptureError(
                f"a forward was captured in several graphs, and the compiler needs one; {self._breaks.first()}. "
                "It would run unskipped"
            )


def _made_up(gm: fx.GraphModule, *inputs: Any) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value for value in inputs
    ]
    with torch.no_grad(), mode:
        outputs = gm.forward(*fakes)
    return tuple(_real(value) for value in outputs)


def _real(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    make = torch.zeros if value.numel() < _LARGE else torch.empty
    return make(tuple(value.shape), dtype=value.dtype)


def _run(model: Any, recorder: _Recorder, call: Any) -> None:
    """Call ``model`` for a prompt and one more token, each by way of ``call``."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        recorder.calls += 1
        return call(*args, **kwargs)

    ids = torch.ones(1, prompt_length(model), dtype=torch.long)
    if not hasattr(model, "generate"):
        result = counted(ids)
        if isinstance(result, tuple) and len(result) > 1:
            counted(ids[:, :1], result[1])
        return
    model._compiled_call_impl = counted
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        disable_compile=True,
    )


def prompt_length(model: nn.Module) -> int:
    """Return how many tokens to capture a prefill of: more than a sliding window where the model has one."""
    window = getattr(text_config(model), "sliding_window", None)
    wanted = _PROMPT + window if isinstance(window, int) and window < _LONGEST_PROMPT else _PROMPT
    return min(wanted, (longest_context(model) or _LONGEST_PROMPT) - 4)


def _phase_graph(gm: fx.GraphModule, on_cpu: bool) -> PhaseGraph:
    # The copy is on the CPU, whatever the model is on; elsewhere windows stay masks.
    result = canonicalised(gm, CANONICALISE if on_cpu else STRAIGHTEN)
    return PhaseGraph(result.stream.phase, result.gm, result.stream)
