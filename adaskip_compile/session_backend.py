"""What Dynamo calls: the backend of one session, and what stands for each graph that it admitted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

from adaskip_compile.sessions import Session
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
        return session.admit(gm, example_inputs)
