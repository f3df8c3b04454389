"""The ``torch.compile`` backend: ``torch.compile(model, backend="adaskip", options={...})``.

Registered as an entry point, so it needs no import. Options are those of
:class:`adaskip_compile.Options`; ``mode`` is accepted, because ``transformers`` always passes one, and
has no effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.capture import (
    compiled_module,
    constant_floats,
    make_room_for_graphs,
    specialise_floats,
)
from adaskip_compile.identity import unwrapped
from adaskip_compile.kept_captures import capture_keeper
from adaskip_compile.options import Options
from adaskip_compile.plans import SkipPlan
from adaskip_compile.sessions import Session, session_for


def adaskip(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured. Called by ``torch.compile``, not by users.

    Raises:
        OptionError: An option is unknown or cannot take its value.
        FileError: A plan or profile that ``options`` names cannot be read, or is of another model.
    """
    make_room_for_graphs()
    specialise_floats(gm)
    session = session_for(_model_of(example_inputs), Options.from_mapping(options or {}))
    # Equal options are one backend to Dynamo, whatever the model.
    return session.admit(gm, example_inputs, guard=True)


def _model_of(inputs: Sequence[Any]) -> nn.Module | None:
    module = compiled_module(inputs)
    return None if module is None else unwrapped(module)


def compile(model: nn.Module, plan: SkipPlan | str | os.PathLike[str] | None = None, **options: Any) -> nn.Module:
    """Compile ``model`` in place with the adaskip backend and return it; ``model.generate()`` goes through it.

    ``plan`` is a plan or the file of one; ``options`` are the other fields of :class:`Options`. Calling
    it again with the same options and another ``plan`` switches the plan for requests that start from
    then on, and captures nothing anew. Of a wrapper that forwards ``generate`` (a ``PeftModel``) the model inside is
    compiled, which both go through; its sublayers keep the paths that they have in that model.

    Raises:
        OptionError: An option is unknown or cannot take its value.
        ForeignFileError: The plan or profile was made for another model.
        UnknownSublayerError: The plan names a module that the model lacks.
    """
    checked = Options.from_mapping(options)
    inner = unwrapped(model)
    source = "this plan"
    if plan is not None and not isinstance(plan, SkipPlan):
        source, plan = str(plan), SkipPlan.load(plan)
    if plan is not None:
        plan.check_paths(inner)
    session = session_for(inner, checked)
    if plan is not None:
        session.use(plan, source=source)
    if session.compiled is None:
        make_room_for_graphs()
        session.compiled = constant_floats(_compiled_forward(session, inner))
    inner._compiled_call_impl = session.compiled
    return model


def _compiled_forward(session: Session, model: nn.Module) -> Callable[..., Any]:
    """Return the forward of ``model`` compiled under ``session``, with the captures that earlier processes kept."""
    keeper = capture_keeper(session, model)
    if keeper is None:
        return torch.compile(model._call_impl, backend=SessionBackend(session), dynamic=True)
    return keeper.compiled(model._call_impl)


class SessionBackend:
    """The backend of one session: graphs need not be matched to a model again."""

    __name__ = "adaskip"

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph that Dynamo captured."""
        return self._session.admit(gm, example_inputs)
