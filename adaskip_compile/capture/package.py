"""Captures that outlive their process: all that depends on how Dynamo hands out a capture, and takes it back.

A capture is a graph, the bytecode that calls it, and the guards that say which calls both are right for. Dynamo
tells them to an object that stands for one of its compile packages; here, :class:`CaptureRecorder`. In another
process :func:`install` gives them back, so that a call that the guards let through is not traced again.

Guards are kept with the values that were seen, so they mean the same in any process. Those that compare identities
(of a function, a class, a module) cannot be: of each, what it was is kept, compared when the capture is installed,
and from then on the identity is guarded that the object has there. Nothing is let through on trust.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pickle
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from adaskip_compile.capture.dynamo import collector_paused
from adaskip_compile.capture.fingerprints import code_digest, decorators_above, describe, file_digest, unwrapped
from adaskip_passes.errors import CaptureError

log = logging.getLogger(__name__)

# Guards on what an object is. Of all others Dynamo keeps the value that was seen.
_IDENTITIES = {"ID_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH"}
# Dynamo's compile packages are no public interface: each version of torch is tried before it is trusted.
_TRIED = ("2.13",)
_SAME_CODE = "the forwards and hooks that were captured"


def why_not() -> str | None:
    """Return why captures cannot be kept in this process, or None."""
    if ".".join(torch.__version__.split(".")[:2]) not in _TRIED:
        return f"that is not tried with torch {torch.__version__}"
    if torch._dynamo.config.caching_precompile:
        return "Dynamo keeps its own (torch._dynamo.config.caching_precompile)"
    return None


@dataclass(frozen=True)
class Capture:
    """What Dynamo made of one frame, as data that can be pickled.

    Args:
        module: The module whose global names the code uses.
        function: The name of the function there in which the code that was captured is found.
        place: The way from that function to the code.
        captured: Digest of the code that was captured.
        bytecode: What runs in its place, in the form that Dynamo gives code to be pickled.
        graph: The global name under which ``bytecode`` calls the graph.
        imports: Modules by the global names under which guards know them, and ``bytecode`` may.
        installed: Modules by the other global names under which Dynamo put them there for ``bytecode``.
        guards: Dynamo's guards on values, pickled by Dynamo.
        identities: Guards on identities, pickled: the source of each, its kind, and what was found there.
        files: SHA-256 of each source file that was traced.
    """

    module: str
    function: str
    place: str
    captured: str
    bytecode: Any
    graph: str
    imports: dict[str, str]
    installed: dict[str, str]
    guards: bytes
    identities: bytes
    files: dict[str, str]


@dataclass
class _Recording:
    """What Dynamo has told of the capture that is being made."""

    code: types.CodeType
    imports: dict[str, str] = field(default_factory=dict)
    installed: dict[str, Any] = field(default_factory=dict)
    graphs: list[str] = field(default_factory=list)
    guards: bytes = b""
    identities: bytes = b""
    bytecode: types.CodeType | None = None
    traced: list[types.CodeType] = field(default_factory=list)
    spoiled: str = ""


class CaptureRecorder:
    """Stands for a compile package of Dynamo's: is told of each capture, and hands it on to ``keep``.

    What cannot be kept is captured all the same; the log says why. Of what is captured, ``guard`` returns one more
    guard, on what Dynamo does not look at.
    """

    def __init__(self, keep: Callable[[Capture], None], guard: Callable[[], Callable[[Any], bool]]) -> None:
        self._keep, self._guard = keep, guard
        self._now: _Recording  # from the first capture on: Dynamo tells of nothing else

    @contextmanager
    def code_context(self, code: types.CodeType) -> Iterator[None]:
        """Be told of a capture of ``code``: Dynamo makes it within this context."""
        self._now = recording = _Recording(code)
        guards = torch._dynamo.guards
        pickler, serialize = guards.GuardsStatePickler, guards.CheckFunctionManager.serialize_guards
        build = guards.CheckFunctionManager.build_guards
        reduce = _finding_decorated_functions(pickler.reducer_override)

        def serialize_all(*about: Any) -> bytes:
            return _serialize(serialize, recording, *about)

        def build_all(*about: Any, **how: Any) -> Any:
            builder, manager = build(*about, **how)
            manager.root.add_lambda_guard(self._guard(), [_SAME_CODE], None)
            return builder, manager

        with (
            mock.patch.object(guards.CheckFunctionManager, "build_guards", build_all),
            mock.patch.object(guards.CheckFunctionManager, "serialize_guards", serialize_all),
            mock.patch.object(pickler, "reducer_override", reduce),
            collector_paused(),
        ):
            yield
        try:
            self._keep(_finished(recording))
        except Exception as error:  # noqa: BLE001 - Dynamo's innards raise anything, and the capture itself is good
            log.info("the capture of %s is not kept: %s", code.co_name, error)

    def add_import_source(self, alias: str, module_name: str) -> None:
        """Take the global name under which the code and its guards know a module."""
        self._now.imports[alias] = module_name

    def add_backend_id(self, backend_id: str, backend: Any = None) -> None:
        """Take the global name under which the code calls the graph."""
        self._now.graphs.append(backend_id)

    def add_guarded_code(self, guards_state: bytes, dynamo_code: types.CodeType) -> None:
        """Take the guards and the bytecode."""
        self._now.guards, self._now.bytecode = guards_state, dynamo_code

    def add_inlined_source(self, sources: Sequence[types.CodeType]) -> None:
        """Take the code of all functions that were traced."""
        self._now.traced = list(sources)

    def add_resume_function(self, python_code: types.CodeType, python_module: str, function_name: str) -> None:
        """Take that the graph broke, and goes on in a function of its own."""
        self._now.spoiled = "the graph breaks"

    def bypass_current_entry(self) -> None:
        """Take that Dynamo gives the capture up for keeping."""
        self._now.spoiled = "Dynamo says so"

    def update_device_type(self, graph: Any) -> None:
        """Take nothing: guards on tensors say the device."""

    def is_initialized(self) -> bool:
        """Tell Dynamo that it has nothing to load."""
        return True


def install(capture: Capture, run: Callable[..., Any], *, name: str, applies: Callable[[], bool]) -> None:
    """Let calls that the guards of ``capture`` let through run its bytecode, which calls ``run`` for the graph.

    Only while ``applies()`` is true: code is shared by all models of a class, and each may be compiled in its own way.
    ``name`` is a global name that no other capture has, for ``run``.

    Raises:
        CaptureError: What the capture was made from is not what is there now.
    """
    from torch._C._dynamo.eval_frame import _load_precompile_entry
    from torch._dynamo.package import SerializedCode

    for file, digest in capture.files.items():
        if file_digest(file) != digest:
            raise CaptureError(f"{Path(file).name} has changed")
    code = _find_code(capture)
    scope = vars(importlib.import_module(capture.module))
    for alias, module in capture.imports.items():
        scope[alias] = importlib.import_module(module)
    manager = _guard_manager(capture, code, scope)

    def is_ours(_: Any) -> bool:
        return applies()

    manager.root.add_lambda_guard(is_ours, [f"the compiled model that this was captured for, and {_SAME_CODE}"], None)
    # Under names of their own: Dynamo takes back what it put there itself.
    renamed = {one: f"{name}_{place}" for place, one in enumerate(capture.installed)}
    for one, module in capture.installed.items():
        scope[renamed[one]] = importlib.import_module(module)
    renamed[capture.graph] = name
    scope[name] = torch._dynamo.disable(run)
    bytecode = SerializedCode.to_code_object(capture.bytecode)
    names = tuple(renamed.get(one, one) for one in bytecode.co_names)
    _load_precompile_entry(code, manager, bytecode.replace(co_names=names))


def _finished(recording: _Recording) -> Capture:
    from torch._dynamo.package import SerializedCode, _get_code_source

    if recording.spoiled:
        raise CaptureError(recording.spoiled)
    bytecode = recording.bytecode
    graphs = [name for name in recording.graphs if bytecode is not None and name in bytecode.co_names]
    if bytecode is None or not recording.guards or len(graphs) != 1:
        raise CaptureError(f"Dynamo made {len(graphs)} graphs of it")
    module = inspect.getmodule(recording.code)
    if module is None:
        raise CaptureError("its module is not to be found")
    function, place = _get_code_source(recording.code)
    installed = {name: value for name, value in recording.installed.items() if name in bytecode.co_names}
    for name, value in installed.items():
        if not isinstance(value, types.ModuleType):
            raise CaptureError(f"its code needs a {type(value).__name__} of this process, {name}")
    files = {code.co_filename for code in (recording.code, *recording.traced)}
    return Capture(
        module.__name__,
        function,
        place,
        code_digest(recording.code),
        SerializedCode.from_code_object(bytecode),
        graphs[0],
        recording.imports,
        {name: module.__name__ for name, module in installed.items()},
        recording.guards,
        recording.identities,
        # Generated functions have none; they are made by code that has.
        {file: file_digest(file) for file in sorted(files) if not file.startswith("<")},
    )


def _serialize(
    serialize: Callable[..., bytes], recording: _Recording, manager: Any, builder: Any, guards: Any, graph: Any
) -> bytes:
    """Serialise ``guards`` as Dynamo does, but for those on identities; return nothing where that is not possible."""
    # Not by comparing guards with each other, which takes longer than all else here.
    kinds = [(guard, _is_by_identity(guard)) for guard in guards]
    by_identity = [guard for guard, identity in kinds if identity]
    by_value = [guard for guard, identity in kinds if not identity]
    try:
        found = [(one.originating_source, one.create_fn_name(), describe(builder.get(one))) for one in by_identity]
        recording.identities = pickle.dumps(found)
        own = {*recording.graphs, *recording.imports}
        recording.installed = {name: graph.global_scope[name] for name in graph.installed_globals if name not in own}
        return serialize(manager, builder, by_value, graph)
    except Exception as error:  # noqa: BLE001 - whatever a value raises that cannot be pickled
        recording.spoiled = str(error)
        return b""


def _is_by_identity(guard: Any) -> bool:
    return bool(_IDENTITIES.intersection((guard.create_fn_name(), *(guard.guard_types or ()))))


def _finding_decorated_functions(reduce: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return how to pickle guarded values as ``reduce`` does, and functions too that a decorator hides."""

    def reducer_override(pickler: Any, value: Any) -> Any:
        depth = decorators_above(value) if isinstance(value, types.FunctionType) else 0
        return (unwrapped, (value.__module__, value.__qualname__, depth)) if depth else reduce(pickler, value)

    return reducer_override


def _guard_manager(capture: Capture, code: types.CodeType, scope: dict[str, Any]) -> Any:
    """Return what checks the guards of ``capture``, those on identities too, which have to be what they were."""
    from torch._dynamo import guards
    from torch._dynamo.output_graph import OutputGraphCommon, get_builtins_dict
    from torch._dynamo.package import load_guards_state
    from torch._guards import Guard, GuardsSet
    from torch.utils._ordered_set import OrderedSet

    state = load_guards_state(capture.guards)
    graph = state.output_graph
    values = {**{alias: scope[alias] for alias in capture.imports}, **graph.global_scope}
    builtins_name = graph.name_of_builtins_dict_key_in_fglobals
    if builtins_name:
        values[builtins_name] = scope[builtins_name] = get_builtins_dict(scope)
        _pass_over(builtins_name)
    identities = pickle.loads(capture.identities)
    for source, _, _ in identities:
        name = guards.get_global_source_name(source)
        if isinstance(name, str) and name in scope:
            values[name] = scope[name]
    for source, _, known in identities:
        found = source.get_value({"L": graph.local_scope, "G": values}, guards._get_closure_vars(), {})
        if describe(found) != known:
            raise CaptureError(f"{source.name} is another {known[0]} than before")
    again = [Guard(source, getattr(guards.GuardBuilder, kind)) for source, kind, _ in identities]
    everything = GuardsSet(OrderedSet([*graph.guards, *again]))
    return guards.CheckFunctionManager(
        code,
        OutputGraphCommon(replace(graph, global_scope=values, _guards=everything)),
        shape_code_parts=state.shape_code_parts,
        runtime_global_scope=scope,
    ).guard_manager


def _pass_over(name: str) -> None:
    """Have Dynamo, which numbers the names that it gives, not give ``name`` in this process: it would find it taken."""
    from torch._dynamo.bytecode_transformation import unique_id

    number = int(name.rpartition("_")[2])
    while int(unique_id("adaskip").rpartition("_")[2]) < number:
        pass


def _find_code(capture: Capture) -> types.CodeType:
    from torch._dynamo.package import _lookup_code

    importlib.import_module(capture.module)
    entry: Any = types.SimpleNamespace(
        python_module=capture.module, function_names=[capture.function], code_source=capture.place
    )
    code = _lookup_code(entry)
    if code_digest(code) != capture.captured:
        raise CaptureError(f"{capture.function} has changed")
    return code
