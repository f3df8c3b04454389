"""One compiled model: its options and plan, its graphs, its requests, and what it learns.

Dynamo may capture one model several times (prefill, decode, another batch class). All captures of
one ``torch.compile`` configuration share a session, so that a request can begin in one graph and go
on in another.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx, nn

from adaskip_compile.capture.cache_object import CachePlace
from adaskip_compile.files.model_identity import ModelIdentity, identify, unwrapped
from adaskip_compile.kv_cache.growing_storage import GrowingStorages
from adaskip_compile.lowering.lowering import start_cpu_compiler
from adaskip_compile.options import Options, resolve_plan
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.learning import Learner
from adaskip_compile.runtime.request_table import RequestTable
from adaskip_compile.runtime.requests import Request
from adaskip_compile.runtime.variants import VariantCache
from adaskip_passes.stream.stream import ResidualStream

log = logging.getLogger(__name__)


class CapturedGraph(Protocol):
    """What a session, and who reports on it, asks of a graph that was admitted to it."""

    gm: fx.GraphModule
    stream: ResidualStream
    place: CachePlace | None
    calls: int
    restored: bool
    captured_because: str | None
    variants: VariantCache

    def prepare(self, request: Request) -> None:
        """Make the variant that ``request`` will begin to decode with."""


class Session:
    """The state behind one compiled model. Made by :func:`session_for`; users see it through ``report``."""

    def __init__(self, module: nn.Module | None, options: Options) -> None:
        self.options = options
        self.requests = RequestTable(module)
        self.storages = GrowingStorages()
        self.graphs: list[CapturedGraph] = []
        self.unskipped: list[str] = []
        self.notes: list[str] = []
        self._module = weakref.ref(module) if module is not None else None
        self._identity: ModelIdentity | None = None
        self.compiled: Callable[..., Any] | None = None
        self.lock = threading.RLock()
        self.plan: SkipPlan | None = SkipPlan.none() if options.runs_in_full else resolve_plan(options, self.identity)
        self.learner = None if self.plan is not None else self._learner()
        if options.inner == "inductor" and self._on_cpu():
            start_cpu_compiler()

    @property
    def module(self) -> nn.Module | None:
        """The model, or None where a plain function was compiled or the model is gone."""
        return self._module() if self._module is not None else None

    @property
    def model_name(self) -> str:
        """What to call the model in logs and folders: its class."""
        return "function" if self.module is None else type(self.module).__name__

    def _on_cpu(self) -> bool:
        parameters = self.module.parameters() if self.module is not None else iter(())
        return any(parameter.device.type == "cpu" for parameter in parameters)

    @property
    def identity(self) -> ModelIdentity | None:
        """Who the model is; read off its weights on first use."""
        if self._identity is None and self.module is not None:
            self._identity = identify(self.module)
        return self._identity

    @property
    def learning(self) -> bool:
        """Whether requests still run in full, probed, to learn what to skip."""
        return self.plan is None

    def use(self, plan: SkipPlan, *, source: str = "this plan") -> None:
        """Let requests that start from now on follow ``plan``; running ones keep theirs. No graph is captured again."""
        if self.identity is not None:
            plan.check(self.identity, source=source)
        with self.lock:
            self.plan, self.learner = plan, None

    def plan_for_new_request(self) -> SkipPlan:
        """Return the plan of a request that starts now; one that skips nothing while learning."""
        return self.plan if self.plan is not None else SkipPlan.none()

    def learn(self, rows: torch.Tensor, stream: Any, tokens: int) -> None:
        """Take the probes of one learning request; after enough of them, plan and specialise."""
        with self.lock:
            if self.learner is None:
                return
            profile = self.learner.add(rows, stream, tokens)
            if profile is not None:
                self.plan = self.learner.plan(profile)
                self.learner = None
                self.note(
                    f"learned from {profile.samples} requests: new requests skip {len(self.plan.paths)} sublayers"
                )

    def note(self, text: str) -> None:
        """Record something that the user should know, once, and log it."""
        with self.lock:
            if text not in self.notes:
                self.notes.append(text)
                log.warning("%s: %s", self.model_name, text)

    def prepare_decode(self, request: Request) -> None:
        """Have the decode graphs that are there specialised for ``request``, while its prefill is waited for anyway."""
        for graph in tuple(self.graphs):
            if graph.stream.phase == "decode":
                graph.prepare(request)

    def why_unskipped(self) -> str | None:
        """Return why a call must run in full right now, or None."""
        if self.module is not None and self.module.training:
            return "the model is in training mode: it runs unskipped; call model.eval() first"
        return None

    def _learner(self) -> Learner:
        learner = Learner(self.options, self.identity, self.note)
        known = learner.remembered()
        if known is not None:
            self.plan = learner.plan(known)
            self.note(f"starts specialised: learned earlier from {known.samples} requests ({learner.path})")
        return learner


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, list[Session]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def session_for(module: nn.Module | None, options: Options) -> Session:
    """Return the session of ``module`` under equal ``options``, a new one where there is none. Safe under threads.

    A plain function has no module to know it by: each of its captures gets a session of its own.
    """
    if module is None:
        return Session(None, options)
    with _LOCK:
        # A graph break leaves a module inside a model on its own: it is still that model's.
        whole = (known for known in _SESSIONS if any(part is module for part in known.modules()))
        sessions = _SESSIONS.setdefault(next(whole, module), [])
        known = next((session for session in sessions if session.options == options), None)
        if known is None:
            known = Session(module, options)
            sessions.append(known)
        return known


def sessions_of(module: nn.Module) -> tuple[Session, ...]:
    """Return the sessions of ``module``, oldest first; of a part of a compiled model those that it was compiled in itself."""
    module = unwrapped(module)
    with _LOCK:
        known = [(root, session) for root, sessions in _SESSIONS.items() for session in sessions]
        return tuple(session for root, session in known if module in (root, session.module))


def forget_sessions(module: nn.Module) -> tuple[Session, ...]:
    """Return the sessions of ``module``, which has none from here on."""
    with _LOCK:
        return tuple(_SESSIONS.pop(module, ()))
