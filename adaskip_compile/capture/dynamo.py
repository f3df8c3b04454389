"""Everything here that depends on how Dynamo hands a graph to its backend.

Public interfaces tell a backend the graph and example inputs. Which model the graph belongs to is told by the
weights among these: the modules whose calls are under way are looked through for the one that holds them.
"""

from __future__ import annotations

import functools
import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from adaskip_compile.capture.graph_breaks import break_text
from adaskip_passes.ir.module_paths import held_tensors


@dataclass(frozen=True)
class Place:
    """Where in a model the graph lies that Dynamo is capturing right now.

    Args:
        root: The module that the user compiled, or None for a function of no one module.
        module: The part of ``root`` whose call the graph is of, the root itself unless capture broke; None for code
            that reaches its weights through no module.
        source: Dynamo's own name of ``module``, which guards are made of.
        resumed: Whether it is the rest of a function, behind a graph break in it.
    """

    root: nn.Module | None
    module: nn.Module | None
    source: Any
    resumed: bool

    def guard(self) -> None:
        """Have the graph serve this one module alone.

        Weights are inputs of a graph, so Dynamo would call it for any module of equal code and shapes.
        """
        from torch._dynamo.guards import GuardBuilder, install_guard

        if self.source is not None:
            install_guard(self.source.make_guard(GuardBuilder.ID_MATCH))


def place_in(root: nn.Module | None, gm: fx.GraphModule, inputs: Sequence[Any]) -> Place:
    """Return where in ``root`` the graph ``gm`` lies that Dynamo is capturing, which is called with ``inputs``."""
    frame = captured_frame()
    resumed = frame is not None and frame.f_code.co_name.startswith("torch_dynamo_resume_in_")
    if root is None or frame is None:
        return Place(root, None, None, resumed)
    parts = {id(one): one for one in root.modules()}
    held = held_tensors(root)
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False):
        if id(value) not in held:
            continue
        # The way to a weight leads through the modules that hold it: the first of them is what was called.
        for source in reversed(_way_to(getattr(node, "_dynamo_source", None))):
            value = _value_of(source, frame)
            module = parts.get(id(getattr(value, "_orig_mod", value)))
            if module is not None:
                return Place(root, module, source, resumed)
    return Place(root, None, None, resumed)


def compiled_module(inputs: Sequence[Any]) -> nn.Module | None:
    """Return the module that the user compiled, of which Dynamo is capturing a graph with ``inputs`` right now.

    Of the modules whose calls are under way within what was compiled it is the one that holds most of the weights
    among ``inputs``, the outermost of several; where a function was compiled, the one module among its variables that
    holds them all. Which names these go by differs with every decorator and wrapper around a forward. None for a
    function of no one module.
    """
    weights = {id(value) for value in inputs if isinstance(value, nn.Parameter)}
    called = _modules_called()
    if called:
        return max(reversed(called), key=lambda one: len(weights & held_tensors(one).keys()))
    return next((one for one in _modules_given() if weights <= held_tensors(one).keys()), None)


def _modules_called() -> list[nn.Module]:
    """Return the modules whose calls have led to the code that is being captured, the innermost first.

    Those alone that lie within what was compiled: the nearest call into Dynamo is where that begins.
    """
    from torch._dynamo import convert_frame, eval_frame

    calls = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}
    found: dict[int, nn.Module] = {}
    captured = False
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file == convert_frame.__file__:
            captured = True
            found.clear()  # what came before is Dynamo's own work
        elif captured and file == eval_frame.__file__:
            break
        elif captured and frame.f_code in calls:
            module = frame.f_locals["self"]
            found[id(module)] = getattr(module, "_orig_mod", module)
        frame = frame.f_back  # type: ignore[assignment]
    return list(found.values())


def _modules_given() -> Iterator[nn.Module]:
    """Yield the modules among the variables of the function that is being captured, and in its variable arguments."""
    frame = captured_frame()
    for value in () if frame is None else frame.f_locals.values():
        for one in value if isinstance(value, tuple) else (getattr(value, "__self__", value),):
            module = getattr(one, "_orig_mod", one)
            if isinstance(module, nn.Module):
                yield module


def _way_to(source: Any) -> list[Any]:
    """Return Dynamo's sources of which ``source`` is made, itself first: the value, what holds it, what holds that."""
    way = []
    while source is not None:
        way.append(source)
        source = getattr(source, "base", None)
    return way


def _value_of(source: Any, frame: Any) -> Any:
    """Return what ``source`` names in the frame that is being captured, None where that cannot be told."""
    try:
        return eval(source.name, {"L": frame.f_locals, "G": frame.f_globals})
    except Exception:  # noqa: BLE001 - a name may call functions that guards alone know
        return None


def captured_frame() -> Any:
    """Return Dynamo's account of the frame that it is capturing right now, or None outside of a capture."""
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
    return break_text(stop)


def constant_floats(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a compiled function so that captures take a module's floats for constants, under a guard.

    With ``dynamic=True`` Dynamo would make an input of every epsilon and scaling factor. Where Dynamo will
    not capture another graph, the call fails: the original forward knows nothing of skipped cache entries.
    """
    from torch._dynamo import config

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Settings belong to a thread, and a model may be called in another one than it was compiled in.
        room = max(config.recompile_limit, config.accumulated_recompile_limit)
        with config.patch(specialize_float=True, fail_on_recompile_limit_hit=True, recompile_limit=room):
            return compiled(*args, **kwargs)

    return call


def make_room_for_graphs() -> None:
    """Have Dynamo, in all threads, capture as many graphs as the models of a process need.

    It counts them by code object, and all models of ``transformers`` share one. Past its limits, eight and 256 as they
    come, it would run the original forward in silence, even in the middle of a request. The room grows with the graphs
    that are captured with this backend alone, so that a function of somebody else's that is captured again and again
    comes to an end.
    """
    from torch._dynamo import config

    room = max(config.accumulated_recompile_limit, 2 * capture_count() + 256)
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, name, max(getattr(config, name), room))
        # What is set is set for this thread. Threads where nothing is set go by the default.
        entry = config._config[name]  # type: ignore[attr-defined]
        entry.default = max(entry.default, room)


def capturing() -> Any:
    """Return the lock that Dynamo holds while it captures a graph.

    Compiling sets process-wide flags (that code is compiled, that FX traces) and puts back what it found, so whatever
    compiles outside of a capture must hold this lock too. Calls of what is compiled do not need it.
    """
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def specialise_floats(gm: fx.GraphModule) -> None:
    """Have Dynamo capture again with the float inputs of ``gm`` as constants, where it has any.

    Graphs are lowered after capture has ended, when it is too late to ask for constants; inner
    compilers ask for them in the same way, by this exception. Dynamo knows a float by the symbol that it gave it first,
    also where it has been found equal to a number since (``_expr``).
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    values = [node.meta.get("example_value") for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    floats = [str(value.node._expr) for value in values if isinstance(value, torch.SymFloat)]
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

    Of two inputs that are one object, an inner compiler would take one for both. A number is given as what it has been
    found equal to since it was captured: compiling one region may tell that lengths are equal, and sizes in the next are
    then in terms of one of them, which that region need not be given by its first name.
    """
    values: list[Any] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        if isinstance(value, FakeTensor) and any(value is other for other in values):
            with value.fake_mode:
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if isinstance(value, torch.SymInt):
            known = value.node
            value = known.shape_env.create_symintnode(known.expr, hint=known.hint)
        values.append(value)
    return values


def forget_marks(tensor: torch.Tensor) -> None:
    """Forget which sizes of ``tensor`` the inner compiler found to be dynamic.

    It marks what it returns. Dynamo would then give each layer's cache a symbol of its own, instead of
    one for all that have the same length, and equal layers would no longer look equal.
    """
    tensor.__dict__.pop("_dynamo_propagated_dynamic_indices", None)
    tensor.__dict__.pop("_dynamo_weak_dynamic_indices", None)


def forget_graphs(ours: Callable[[Any], bool]) -> None:
    """Have Dynamo forget what it captured with a backend, or compiled to a callable, that ``ours`` is true of.

    It does so by itself where a model is gone. The code that it captured belongs to all models of a class, and what it
    keeps of the others stays.
    """
    from torch._dynamo import convert_frame, eval_frame
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    with capturing():
        codes = [code for known in convert_frame.input_codes.seen if (code := known()) is not None]
        for entry in [entry for code in codes for entry in eval_frame._debug_get_cache_entry_list(code)]:
            if ours(entry.backend) or any(map(ours, _callables(entry))):
                why = DeletedGuardManagerWrapper("the uncompiled model was asked back")
                entry.guard_manager.extra_state.invalidate(entry, why)  # type: ignore[union-attr]
        backends = eval_frame.cached_backends
        for key in [key for key, backend in backends.items() if ours(backend)]:
            del backends[key]


def _callables(entry: Any) -> list[Any]:
    """Return what the code of one of Dynamo's cache entries calls by the names that Dynamo gave."""
    if entry.code is None:  # it has been forgotten before
        return []
    scope = entry.guard_manager.global_scope["G"]
    called = (scope.get(name) for name in entry.code.co_names if name.startswith("__compiled_fn"))
    return [getattr(one, "_torchdynamo_orig_callable", one) for one in called]
