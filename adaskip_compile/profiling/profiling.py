"""Offline learning: measure every sublayer of a model over sample texts (AdaSkip section 3.2)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from torch import fx, nn

from adaskip_compile.capture.dynamo import constant_floats
from adaskip_compile.capture.graph_breaks import GraphBreaks
from adaskip_compile.costs.model_costs import ModelCosts, costs_of_prefill
from adaskip_compile.display.progress import show_progress
from adaskip_compile.files.model_identity import identify, unwrapped
from adaskip_compile.profiling.layers import find_layers
from adaskip_compile.profiling.profiles import Profile, make_profile
from adaskip_passes.errors import CaptureError, ProfileError
from adaskip_passes.ir.module_paths import naming
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.pipelines import canonicalised
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.stream.stream import ResidualStream


class _Prober:
    """A backend that runs each graph in full with a probe on every sublayer, and keeps the statistics."""

    def __init__(self) -> None:
        self.streams: list[ResidualStream] = []
        self.costs: ModelCosts | None = None
        self.rows: list[torch.Tensor] = []
        self.runs = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        straight = canonicalised(gm)
        gm, stream = straight.gm, straight.stream
        self.streams.append(stream)
        if self.costs is None and not stream.problems:
            self.costs = costs_of_prefill(gm, stream)
        spans = tuple((layer[0], layer[-1]) for layer in whole_layers(stream.paths))
        probed = gm if stream.problems else run_pipeline(gm, stream, (InsertProbes(stream.paths, spans),)).gm

        def run(*values: Any) -> Any:
            self.runs += 1
            outputs = probed.forward(*values)
            if stream.problems:
                return outputs
            self.rows.append(outputs[-1])
            return tuple(outputs[:-1])

        return run


def profile(
    model: nn.Module,
    samples: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    max_samples: int = 20,
    progress: bool = True,
) -> Profile:
    """Measure similarity and scale of every sublayer of ``model`` over ``samples``, prefill only.

    ``samples`` are texts, which need a ``tokenizer``, or token ids ``(tokens,)`` or ``(batch, tokens)``
    of at least two tokens; at most ``max_samples`` are used (the authors use 20). The mean over tokens
    of a sample is paper Eq. 2 and 3; the profile keeps one value a sample. Each whole layer's similarity is
    measured too, for policies that skip whole layers, and what the sublayers cost is read from the graph. With
    ``progress`` a bar is shown on a terminal.

    Raises:
        ProfileError: No samples, texts without a tokenizer, or a sample too short.
        CaptureError: The model has no residual stream, or is not captured as one graph.
    """
    model = unwrapped(model)
    prober = _Prober()
    tokens = run_samples(model, prober, samples, tokenizer=tokenizer, max_samples=max_samples, progress=progress)
    stream = prober.streams[0]
    return make_profile(identify(model), stream, prober.rows, tokens, whole_layers(stream.paths), prober.costs)


class StreamBackend(Protocol):
    """A Dynamo backend that finds the residual stream of each graph it is given, and counts the runs of its graphs."""

    streams: list[ResidualStream]
    runs: int

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        """Return what runs ``gm``."""
        ...


def run_samples(
    model: nn.Module,
    backend: StreamBackend,
    samples: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any,
    max_samples: int,
    progress: bool,
    title: str = "profiling",
) -> list[int]:
    """Run ``model`` over ``samples`` through ``backend``, prefill only, and return the number of tokens of each.

    Raises:
        ProfileError: No samples, texts without a tokenizer, or a sample too short.
        CaptureError: The model has no residual stream, or is not captured as one graph.
    """

    # An own function object: its captures are not those of the user's compiled model.
    def forward(ids: torch.Tensor) -> Any:
        return model._call_impl(ids, **cheap_arguments(model))

    compiled = constant_floats(torch.compile(forward, backend=naming(model, backend), dynamic=True))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise CaptureError("the model is on the meta device, where it holds no weights to run with: load them first")
    tokens: list[int] = []
    breaks = GraphBreaks()
    with evaluating(model):
        for ids in show_progress(token_ids(samples, tokenizer, max_samples), max_samples, progress, title):
            compiled(ids.to(device))
            tokens.append(ids.numel())
            _require_one_graph(backend, len(tokens), breaks)
    if not tokens:
        raise ProfileError("no samples to profile on: give at least one text or tensor of token ids")
    return tokens


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have ``model`` run without dropout and gradients, and leave it as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def whole_layers(paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the layers of several sublayers: what one of a single sublayer does is measured anyway."""
    return tuple(layer for layer in find_layers(paths) if len(layer) > 1)


def token_ids(samples: Iterable[Any], tokenizer: Any, limit: int) -> Iterator[torch.Tensor]:
    """Yield up to ``limit`` of ``samples`` as token ids ``(batch, tokens)``; :class:`ProfileError` for what is no sample."""
    for index, sample in enumerate(islice(samples, limit)):
        if isinstance(sample, str):
            if tokenizer is None:
                raise ProfileError(f"sample {index} is text: pass tokenizer=, or token ids")
            sample = torch.tensor([tokenizer(sample)["input_ids"]])
        if not isinstance(sample, torch.Tensor) or sample.dim() > 2 or sample.is_floating_point():
            raise ProfileError(
                f"sample {index} is a {type(sample).__name__}: takes text, or a tensor of token ids of 1 or 2 dimensions"
            )
        ids = sample if sample.dim() == 2 else sample[None]
        if not ids.shape[0]:
            raise ProfileError(f"sample {index} has no rows; give at least one")
        if ids.shape[-1] < 2:
            raise ProfileError(f"sample {index} has {ids.shape[-1]} tokens; prefill needs at least 2")
        yield ids


def cheap_arguments(model: nn.Module, rows: int = 1) -> dict[str, Any]:
    """Return keywords that spare the logits of all tokens but the last ``rows``, where the model knows them."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": rows} if "logits_to_keep" in known else {}


def _require_one_graph(prober: StreamBackend, calls: int, breaks: GraphBreaks) -> None:
    if prober.runs != calls:
        raise CaptureError(
            f"the model was captured in {prober.runs - calls + 1} pieces, and a profile needs one graph a forward; "
            f"{breaks.first()}"
        )
    for stream in prober.streams:
        if stream.problems:
            raise CaptureError(f"nothing to profile: {'; '.join(stream.problems)}")
    if len({stream.paths for stream in prober.streams}) > 1:
        raise CaptureError("the graphs of this model have different sublayers from one sample to the next")
