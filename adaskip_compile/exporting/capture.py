"""Capture the prefill and the decode step of a ``transformers`` model with a cache of fixed size.

What export has to know of ``transformers`` is here, how a model is called, and in
:mod:`adaskip_compile.exporting.cache`, what a cache is. Positions are an input of the captured graphs and nothing
in them counts tokens, so a graph whose first attention is skipped still knows where it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn

from adaskip_compile.capture.dynamo import constant_floats, make_room_for_graphs
from adaskip_compile.capture.graph_breaks import why_not_captured
from adaskip_compile.checkpoints.model_config import longest_context
from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_compile.tested_versions import internals_of
from adaskip_passes.errors import CaptureError, OptionError
from adaskip_passes.ir.module_paths import naming

# How many tokens a prefill takes, where a plan does not ask for more. They are a prime in the example, so that their number
# is never taken for a size of the model.
LEAST_TOKENS = 2
_EXAMPLE_TOKENS = 13


@dataclass(frozen=True)
class CapturedPhase:
    """One step of a model as Dynamo captured it.

    ``name`` is ``prefill`` or ``decode``; ``tokens`` are how few and how many it takes; ``values`` are what each placeholder of
    ``gm`` was given. Among them are ``input_ids`` ``(batch, tokens)``, ``positions`` ``(1, tokens)``, and the tensors of ``cache``.
    The graph's only output is the logits.
    """

    name: str
    gm: fx.GraphModule
    values: tuple[Any, ...]
    input_ids: torch.Tensor
    positions: torch.Tensor
    tokens: tuple[int, int]


@dataclass(frozen=True)
class StaticSteps:
    """Both steps of a model, and the cache that they share.

    ``cache`` has the tensors ``(batch, heads, max_length, head_dim)`` by name: ``key_cache_0``,
    ``value_cache_0``, and so on by the index of the layer, as ExecuTorch's exports call them.
    """

    prefill: CapturedPhase
    decode: CapturedPhase
    cache: dict[str, torch.Tensor]


def capture_steps(
    model: nn.Module,
    *,
    batch: int,
    max_length: int,
    least: int = LEAST_TOKENS,
    report: Callable[[str], None] = lambda stage: None,
) -> StaticSteps:
    """Capture ``model`` for ``batch`` rows and up to ``max_length`` tokens, prompt and continuation together.

    A prefill takes ``least`` tokens or more. The model runs three times, on few more than those. ``report`` is told what is
    being done.

    Raises:
        CaptureError: The model is none of ``transformers``, keeps something else than keys and values, or is
            not captured as one graph.
    """
    _require_transformers_model(model)
    with internals_of("transformers", "export"):
        from adaskip_compile.exporting.cache import cache_tensors, make_cache

    make_room_for_graphs()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _native_experts(model):
            cache = make_cache(model, batch, max_length)
            steps = []
            for name, tokens, between in (
                ("prefill", _example_tokens(least), (least, max_length)),
                ("decode", 1, (1, 1)),
            ):
                report(f"capturing {name}")
                steps.append(_capture(model, name, cache, batch, tokens, between))
    finally:
        model.train(was_training)
    return StaticSteps(steps[0], steps[1], cache_tensors(cache))


def _require_transformers_model(model: nn.Module) -> None:
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise CaptureError("export needs transformers: pip install 'adaskip-compile[hf]'") from error
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(
            f"export knows how to call models of transformers, and {type(model).__name__} is none: its cache has no "
            "form that a program could hold. torch.export.export takes any module, without skips"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise CaptureError(f"export needs the weights on one device, and here they are on {', '.join(sorted(devices))}")


@contextmanager
def _native_experts(model: Any) -> Iterator[None]:
    """Have a model with experts compute them with PyTorch's own operators.

    PyTorch's grouped product is for bfloat16 only. In other dtypes ``transformers`` calls an operator of its
    own, which a process with PyTorch alone does not have; the batched product takes its place.
    """
    before = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}
    if model.dtype == torch.bfloat16 or "grouped_mm" not in before.values():
        yield
        return
    model.set_experts_implementation({key: "batched_mm" if how == "grouped_mm" else how for key, how in before.items()})
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _capture(model: Any, name: str, cache: Any, batch: int, tokens: int, between: tuple[int, int]) -> CapturedPhase:
    from adaskip_compile.exporting.cache import tell_positions

    ids = torch.ones(batch, tokens, dtype=torch.long, device=model.device)
    positions = torch.arange(tokens, device=model.device)[None].clone()  # a view would be captured by its base
    if tokens > 1:
        for tensor in (ids, positions):
            torch._dynamo.mark_dynamic(tensor, 1, min=between[0], max=between[1])
    tell_positions(cache, positions)
    captured: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def record(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            captured.append((gm, values))
            return gm.forward(*values)

        return run

    def forward(**arguments: Any) -> Any:
        return model._call_impl(**arguments).logits[:, -1:]

    compiled = constant_floats(torch.compile(forward, backend=naming(model, record), dynamic=False, fullgraph=True))
    try:
        compiled(input_ids=ids, use_cache=True, **cache_argument(model, cache), **_arguments(model, positions))
    except Exception as error:
        raise CaptureError(
            f"{name} of {type(model).__name__} was not captured as one graph ({type(error).__name__}: "
            f"{why_not_captured(error)}); TORCH_LOGS=graph_breaks shows more"
        ) from error
    [(gm, values)] = captured
    captured.clear()  # Dynamo keeps what it has compiled, and with it the weights
    return CapturedPhase(name, gm, values, ids, positions, between)


def _arguments(model: Any, positions: torch.Tensor) -> dict[str, Any]:
    """Return what else the model takes: positions, and not to compute logits that nobody reads."""
    known = inspect.signature(model.forward).parameters
    offered = {"position_ids": positions, "logits_to_keep": 1}
    return {name: value for name, value in offered.items() if name in known}


def check_max_length(model: nn.Module, max_length: int | None, least: int = LEAST_TOKENS) -> int:
    """Return ``max_length``, by default 2048 or what the model allows; :class:`OptionError` where it cannot be.

    A prefill takes ``least`` tokens or more.
    """
    longest = longest_context(model)
    fewest = _example_tokens(least) + 1
    why = "" if least == LEAST_TOKENS else f", for the plan skips in prompts of {least} and more"
    if longest is not None and longest < fewest:
        raise OptionError(f"this model has {longest} positions, and export takes {fewest} or more{why}")
    if max_length is None:
        return min(max(2048, fewest), longest or max(2048, fewest))
    if type(max_length) is not int or max_length < fewest:
        raise OptionError(f"max_length={max_length!r}: takes a number of tokens, {fewest} or more{why}")
    if longest is not None and max_length > longest:
        raise OptionError(f"max_length={max_length}: this model has {longest} positions")
    return max_length


def _example_tokens(least: int) -> int:
    return _EXAMPLE_TOKENS if least <= _EXAMPLE_TOKENS else int(sympy.nextprime(least - 1))
