"""What Dynamo calls: the backend of one session, what stands for each graph that it admitted, and the forward that it compiles."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.capture.module_code import CodeState, ModelCode
from adaskip_compile.runtime.admission import admit
from adaskip_compile.runtime.session import Session
from adaskip_passes.errors import CaptureError


class AdmittedGraph:
    """What Dynamo calls for one captured graph, and the session that admitted it."""

    __slots__ = ("_run", "session")

    def __init__(self, session: Session, run: Callable[..., Any]) -> None:
        self.session, self._run = session, run

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph."""
        return self._run(*inputs)


class SessionBackend:
    """The backend of one session: graphs need not be matched to a model again.

    Dynamo keeps all backends that there ever were, so this one does not hold the session, and with it a model's caches.
    """

    __name__ = "adaskip"

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph that Dynamo captured."""
        session = self._session()
        if session is None:
            raise CaptureError("this compiled call is of a model that was restored since: compile the model again")
        return admit(session, gm, example_inputs)


class WatchedForward:
    """The forward of a model, compiled anew when its code or its hooks change: Dynamo does not look at them again."""

    def __init__(self, session: Session, model: nn.Module) -> None:
        self._session, self._code, self._forward = session, ModelCode(model), model._call_impl
        self._compiled: dict[CodeState, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        state = self._code.state()
        if state not in self._compiled:
            self._compiled[state] = torch.compile(self._forward, backend=SessionBackend(self._session), dynamic=True)
        return self._compiled[state](*args, **kwargs)
