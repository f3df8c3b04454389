"""Captured graphs in the cache directory, so that the next process need not trace the model again.

Tracing takes Dynamo most of the time from the start of a process to its first token. What it finds is kept by
:func:`adaskip_compile.compile` in a folder of the cache directory: one file a graph, in a folder for each model
structure, dtype, device and version of what makes a difference. Files hold compiled code, and so belong to their owner
alone: one that others could have written, or that is damaged, is passed over, and the graph captured again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import operator
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn

from adaskip_compile.capture.cache_object import CachePlace
from adaskip_compile.capture.dynamo import Place, collector_paused, place_in
from adaskip_compile.capture.module_code import CodeState, ModelCode
from adaskip_compile.capture.package import Capture, CaptureRecorder, install, why_not
from adaskip_compile.files.atomic_write import replace_file
from adaskip_passes.errors import AdaSkipError, CaptureError
from adaskip_passes.ir.graph import fake_tensor
from adaskip_passes.ir.module_paths import name_modules
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.ir.serializer import read_graph, write_graph
from adaskip_passes.stream.stream import Phase, ResidualStream

log = logging.getLogger(__name__)

FOLDER = "captures"
_FORMAT = 6
# A model has a few graphs: phases, kinds of cache, one sequence or several. Each takes half a second to install.
_MOST = 8
_numbers = itertools.count()
_called = threading.local()


class CaptureOwner(Protocol):
    """What is asked of the session whose captures are kept."""

    @property
    def module(self) -> nn.Module | None:
        """The model."""

    @property
    def model_name(self) -> str:
        """What to call it."""

    def note(self, text: str) -> None:
        """Record something that the user should know."""


@runtime_checkable
class AdmittedRun(Protocol):
    """What stands for a graph that may be kept; one that is to run in full has neither."""

    stream: ResidualStream
    place: CachePlace | None


# (owner, graph, inputs, place in the model) to what Dynamo shall call; and (owner, graph, place of the cache) likewise.
Admit = Callable[[Any, fx.GraphModule, list[Any], Place], Callable[..., Any]]
Restore = Callable[[Any, fx.GraphModule, "CachePlace | None"], Callable[..., Any]]


@dataclass(frozen=True)
class KeptCapture:
    """One file: what Dynamo made, the graph as JSON-able data, its phase, and where its cache objects are."""

    capture: Capture
    graph: dict[str, Any]
    phase: Phase
    place: CachePlace | None


class CaptureFolder:
    """The captures that are kept of one model structure, as files. Safe under several processes at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kept: KeptCapture) -> None:
        """Keep one more; of too many, those go that were written first."""
        data = pickle.dumps(kept)
        digest = hashlib.sha256(data).hexdigest()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self.path / f"{digest[:16]}.capture", digest.encode() + b"\n" + data)
            for old in self._files()[:-_MOST]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.info("a capture cannot be kept in %s: %s", self.path, error)

    def read(self) -> Iterator[KeptCapture]:
        """Yield what is kept, those that were written last first; the log says what is passed over."""
        for file in reversed(self._files()):
            try:
                _require_own(self.path)
                _require_own(file)
                digest, _, data = file.read_bytes().partition(b"\n")
                if hashlib.sha256(data).hexdigest().encode() != digest:
                    raise CaptureError("it is damaged")
                yield pickle.loads(data)
            except (OSError, CaptureError, ImportError, AttributeError, pickle.UnpicklingError) as error:
                log.warning("%s is passed over, and the graph captured again: %s", file, error)

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.capture"), key=lambda file: (file.stat().st_mtime_ns, file.name))


class CaptureKeeper:
    """Between Dynamo, whose backend it is, and a session: keeps what is captured, and gives back what was kept."""

    __name__ = "adaskip"

    def __init__(
        self, session: CaptureOwner, model: nn.Module, cache_folder: Path, admit: Admit, restore: Restore
    ) -> None:
        self.session, self._code, self._key = session, ModelCode(model), _key(model)
        self._cache_folder, self._admit, self._restore_graph = cache_folder, admit, restore
        self._admitted: tuple[dict[str, Any], Phase, CachePlace | None] | None = None
        self._restored: list[_RestoredGraph] = []

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``forward`` compiled by Dynamo with this as its backend, and all that is kept of it installed."""
        recorder: Any = CaptureRecorder(self._keep, _guard_on_code)
        optimized = torch._dynamo.optimize(self, dynamic=True, package=recorder)(forward)
        with collector_paused():
            self._restore()

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = getattr(_called, "session", None), getattr(_called, "code", None)
            _called.session, _called.code = self.session, self._code.state()
            try:
                return optimized(*args, **kwargs)
            except _UnusableError as error:
                # Nothing has run yet, and the graph at fault is not asked again: Dynamo captures it.
                self.session.note(str(error))
                return optimized(*args, **kwargs)
            finally:
                _called.session, _called.code = before

        return call

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph that Dynamo captured, in the form in which the next process will find it.

        Its regions are then the same there, and what the inner compiler has made of them is found again.
        """
        name_modules(gm, example_inputs, self.session.module)  # what is kept goes by these names
        place = place_in(self.session.module, gm, example_inputs)
        data, again = _read_again(gm)
        run = self._admit(self.session, gm if again is None else again, example_inputs, place)
        kept = data is not None and isinstance(run, AdmittedRun)
        self._admitted = (data, run.stream.phase, run.place) if kept else None  # type: ignore[union-attr, assignment]
        return run

    def _keep(self, capture: Capture) -> None:
        if self._admitted is not None:
            folder = self._folder(_called.code)
            if folder is not None:
                folder.write(KeptCapture(capture, *self._admitted))

    def _folder(self, code: CodeState) -> CaptureFolder | None:
        """Return where captures of a model of this ``code`` are kept; None where its code is of this process alone."""
        if code.why_passing:
            log.info("%s: captures are not kept: %s", self.session.model_name, code.why_passing)
            return None
        key = hashlib.sha256((self._key + code.digest).encode()).hexdigest()[:32]
        return CaptureFolder(self._cache_folder / FOLDER / key)

    def _restore(self) -> None:
        code = self._code.state()
        folder = self._folder(code)
        # A graph whose guards fail costs each call the time of checking them, and there are more steps than prompts.
        found = () if folder is None else folder.read()
        for kept in sorted(found, key=lambda kept: kept.phase != "decode"):
            graph = _RestoredGraph(kept, self.session, code, self._restore_graph)
            try:
                install(kept.capture, graph.caller(), name=f"__adaskip_graph_{next(_numbers)}", applies=graph.guard())
            except Exception as error:  # noqa: BLE001 - Dynamo's innards raise anything; without it the graph is captured
                log.info("%s: a kept capture is not used: %s", self.session.model_name, error)
                continue
            self._restored.append(graph)


def _guard_on_code() -> Callable[[Any], bool]:
    """Return a guard that lets a call through where the model computes what it does in the call that is being made.

    It holds no model: Dynamo keeps guards as long as the code lives, which all models of a class share.
    """
    code = getattr(_called, "code", None)
    return lambda _: getattr(_called, "code", None) == code


class _UnusableError(Exception):
    """A kept graph turns out to be of no use to the model that it was kept of."""


class _RestoredGraph:
    """A kept graph, which is read and taken up by its session when it is first called.

    Dynamo holds what it is given as long as the code lives, which all models of a class share; so what it is given holds
    this graph, and with it a session and a model's caches, by a weak reference alone.
    """

    def __init__(self, kept: KeptCapture, session: CaptureOwner, code: CodeState, restore: Restore) -> None:
        self._kept, self._session, self._code, self._restore = kept, weakref.ref(session), code, restore
        self._run: Callable[..., Any] | None = None
        self._usable = True
        self._lock = threading.Lock()

    def guard(self) -> Callable[[], bool]:
        """Return what tells whether the call that is being made is one of its session's, of a model that computes what it did."""
        target = weakref.ref(self)

        def applies() -> bool:
            graph = target()
            if graph is None or not graph._usable:
                return False
            ours = getattr(_called, "session", None) is graph._session() is not None
            return ours and _called.code == graph._code

        return applies

    def caller(self) -> Callable[..., Any]:
        """Return what Dynamo shall call in place of the graph."""
        target = weakref.ref(self)

        def run(*inputs: Any) -> Any:
            graph = target()
            assert graph is not None  # its session has made the call
            return (graph._run or graph._take_up())(*inputs)

        return run

    def _take_up(self) -> Callable[..., Any]:
        with self._lock:
            if self._run is None:
                session = self._session()
                assert session is not None
                try:
                    with collector_paused():
                        graph = read_graph(self._kept.graph, stubs=False)
                        self._run = self._restore(session, graph, self._kept.place)
                except AdaSkipError as error:
                    self._usable = False
                    raise _UnusableError(
                        f"a graph that an earlier process captured is captured again: {error}"
                    ) from error
            return self._run


def capture_keeper(
    session: CaptureOwner, model: nn.Module, cache_folder: Path, *, admit: Admit, restore: Restore
) -> CaptureKeeper | None:
    """Return what keeps the captures of ``model`` in ``cache_folder``; None where they cannot be kept.

    ``admit`` and ``restore`` say what stands for a graph that was captured now, or by an earlier process.
    """
    reason = why_not()
    if reason is not None:
        log.info("captures are not kept: %s", reason)
        return None
    return CaptureKeeper(session, model, cache_folder, admit, restore)


def _key(model: nn.Module) -> str:
    """Return a digest of what two processes must have in common to share captures, beside the code of the model.

    Guards check all the rest.
    """
    tensors = [
        (name, str(tensor.dtype), str(tensor.device), tuple(tensor.shape))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
    versions = [importlib.metadata.version(name) for name in ("torch", "adaskip-compile")]
    try:
        versions.append(importlib.metadata.version("transformers"))
    except importlib.metadata.PackageNotFoundError:
        versions.append("")
    about = (
        *(_FORMAT, sys.version, *versions, type(model).__module__, type(model).__qualname__),
        *(*tensors, torch.get_num_threads()),
    )
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _read_again(gm: fx.GraphModule) -> tuple[dict[str, Any] | None, fx.GraphModule | None]:
    """Return ``gm`` as data, and the graph that is read from that; None and None where not all of it comes back."""
    if _holds_tensors(gm):
        return None, None
    try:
        text = json.dumps(write_graph(gm))
        data = json.loads(text)
        again = read_graph(data, stubs=False)
    except (AdaSkipError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        log.info("a captured graph cannot be kept: %s", error)
        return None, None
    same = all(one.target is other.target or one.op != "call_function" for one, other in _pairs(gm, again))
    if not same or '{"opaque"' in text or print_graph(again) != print_graph(gm):
        log.info("a captured graph cannot be kept: it does not come back the same")
        return None, None
    again.compile_subgraph_reason = getattr(gm, "compile_subgraph_reason", None)  # type: ignore[assignment]
    return data, again


def _pairs(gm: fx.GraphModule, again: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield each node of ``gm`` and the one that stands for it in ``again``, those of inner graphs too."""
    yield from zip(gm.graph.nodes, again.graph.nodes, strict=True)
    for inner, other in zip(_inner(gm), _inner(again), strict=True):
        yield from _pairs(inner, other)


def _held(gm: fx.GraphModule) -> list[Any]:
    """Return what the nodes of ``gm`` read of its attributes, each once."""
    names = dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))
    return [operator.attrgetter(name)(gm) for name in names]


def _inner(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [one for one in _held(gm) if isinstance(one, fx.GraphModule)]


def _holds_tensors(gm: fx.GraphModule) -> bool:
    """Tell whether ``gm`` has what a file of a graph has not: tensors of its own, and inputs of other kinds than plain ones."""
    plain = (torch._subclasses.FakeTensor, torch.Tensor, nn.Parameter)
    values = (fake_tensor(node) for node in gm.graph.find_nodes(op="placeholder"))
    return (
        any(isinstance(value, torch.Tensor) for value in _held(gm))
        or any(value is not None and (type(value) not in plain or value.layout != torch.strided) for value in values)
        or any(_holds_tensors(inner) for inner in _inner(gm))
    )


def _require_own(path: Path) -> None:
    """Refuse what somebody else could have put there: it would be run."""
    about = path.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise CaptureError("it is not this user's alone")
