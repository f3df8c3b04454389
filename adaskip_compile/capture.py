"""Everything here that depends on how Dynamo hands a graph to its backend.

Public interfaces tell a backend the graph and example inputs. Which model the graph belongs to is
read off the frame that Dynamo is tracing; where that is not to be had, the graph stands alone.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor


def captured_module() -> nn.Module | None:
    """Return the module whose call Dynamo is capturing right now, or None for a plain function."""
    frame = _captured_frame()
    owner = frame.f_locals.get("self") if frame is not None else None
    owner = getattr(owner, "_orig_mod", owner)
    return owner if isinstance(owner, nn.Module) else None


def guard_module() -> None:
    """Have what Dynamo is capturing right now serve this one module alone.

    Weights are inputs of a graph, so Dynamo would call it for any module of equal code and shapes.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import LocalSource

    frame = _captured_frame()
    if frame is not None and isinstance(frame.f_locals.get("self"), nn.Module):
        in_cell = "self" in (*frame.f_code.co_cellvars, *frame.f_code.co_freevars)
        source = LocalSource("self", is_input=True, is_derefed_cell_contents=in_cell)
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def resumes() -> bool:
    """Tell whether what Dynamo is capturing right now is the rest of a function, behind a graph break in it."""
    frame = _captured_frame()
    return frame is not None and frame.f_code.co_name.startswith("torch_dynamo_resume_in_")


def _captured_frame() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx
    except (AttributeError, LookupError):
        return None


def graph_break(gm: fx.GraphModule) -> str | None:
    """Return why and where capture stopped behind ``gm``, or None where it holds the rest of the forward."""
    stop = getattr(gm, "compile_subgraph_reason", None)
    if stop is None or not stop.graph_break:
        return None
    frame = stop.user_stack[-1] if stop.user_stack else None
    place = f" ({Path(frame.filename).name}:{frame.lineno})" if frame is not None else ""
    return stop.reason.strip().splitlines()[0] + place


def constant_floats(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a compiled function so that captures take a module's floats for constants, under a guard.

    With ``dynamic=True`` Dynamo would make an input of every epsilon and scaling factor. Where Dynamo will
    not capture another graph, the call fails: the original forward knows nothing of skipped cache entries.
    """
    from torch._dynamo import config

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        with config.patch(specialize_float=True, fail_on_recompile_limit_hit=True):
            return compiled(*args, **kwargs)

    return call


def make_room_for_graphs() -> None:
    """Have Dynamo capture as many graphs as the models of a process need.

    It counts them by code object, and all models of ``transformers`` share one. Past its limit, eight
    as it comes, it would run the original forward in silence, even in the middle of a request.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, config.accumulated_recompile_limit)


def specialise_floats(gm: fx.GraphModule) -> None:
    """Have Dynamo capture again with the float inputs of ``gm`` as constants, where it has any.

    Graphs are lowered after capture has ended, when it is too late to ask for constants; inner
    compilers ask for them in the same way, by this exception.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    values = [node.meta.get("example_value") for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    floats = [str(value.node.expr) for value in values if isinstance(value, torch.SymFloat)]
    symbols = [name for name in floats if not TensorifyState.should_specialize(name)]
    for name in symbols:
        TensorifyState.specialize(name)
    if symbols:
        raise TensorifyScalarRestartAnalysis


@contextmanager
def collector_paused() -> Iterator[None]:
    """Have Python's garbage collector wait within this context.

    Tracing and lowering make millions of objects that stay: looking them over again and again for what can go takes
    an eighth of their time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture_count() -> int:
    """Return how many graphs Dynamo has captured in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def capture_reason() -> str | None:
    """Return why the graphs that Dynamo has of this code do not serve the call that it is capturing now.

    None for the first capture of a code object, and where Dynamo does not say.
    """
    from torch._dynamo.utils import get_metrics_context

    reason = getattr(get_metrics_context(), "_metrics", {}).get("recompile_reason")
    if not isinstance(reason, str):
        return None
    # "0/2: L['ids'].size()[1] == 1  # where that was assumed": the number of the capture and the place say nothing here.
    guard = reason.strip().partition("\n")[0].partition("  #")[0].strip()
    return re.sub(r"^\d+/\d+: ", "", guard)


def example_inputs(gm: fx.GraphModule) -> list[Any]:
    """Return the fake values of the inputs of ``gm``, in order, each an object of its own.

    Of two inputs that are one object, an inner compiler would take one for both.
    """
    values: list[Any] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        if isinstance(value, FakeTensor) and any(value is other for other in values):
            with value.fake_mode:
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        values.append(value)
    return values


def forget_marks(tensor: torch.Tensor) -> None:
    """Forget which sizes of ``tensor`` the inner compiler found to be dynamic.

    It marks what it returns. Dynamo would then give each layer's cache a symbol of its own, instead of
    one for all that have the same length, and equal layers would no longer look equal.
    """
    tensor.__dict__.pop("_dynamo_propagated_dynamic_indices", None)
    tensor.__dict__.pop("_dynamo_weak_dynamic_indices", None)
