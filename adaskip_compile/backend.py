"""The ``torch.compile`` backend: ``torch.compile(model, backend="adaskip", options={...})``.

Registered as an entry point, so it needs no import. Options are those of
:class:`adaskip_compile.Options`; ``mode`` is accepted, because ``transformers`` always passes one, and
has no effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from adaskip_compile.capture.dynamo import (
    capturing,
    compiled_module,
    constant_floats,
    forget_graphs,
    make_room_for_graphs,
    specialise_floats,
)
from adaskip_compile.capture.store import capture_keeper
from adaskip_compile.files.model_identity import unwrapped
from adaskip_compile.fitting.kept_plans import Budget, kept_plan
from adaskip_compile.fitting.prompt_learner import PromptLearner
from adaskip_compile.options import Options
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.admission import admit, restore_graph
from adaskip_compile.runtime.session import Session, forget_sessions, session_for
from adaskip_compile.runtime.session_backend import AdmittedGraph, WatchedForward
from adaskip_passes.errors import OptionError


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
    _tell_that_nothing_is_skipped(session)
    # Equal options are one backend to Dynamo, whatever the model.
    return AdmittedGraph(session, admit(session, gm, example_inputs, guard=True))


def _model_of(inputs: Sequence[Any]) -> nn.Module | None:
    module = compiled_module(inputs)
    return None if module is None else unwrapped(module)


def compile(
    model: nn.Module,
    plan: SkipPlan | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    texts: Iterable[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """Compile ``model`` in place with the adaskip backend and return it; ``model.generate()`` goes through it.

    With a ``tokenizer`` and no plan, one is found that makes prompts faster and loses at most ``max_loss`` nats a token
    (0.02, 2 % of perplexity, by default) and 5 % of what the model finds in a prompt of ``context`` tokens (1,024). That
    takes minutes, once: the plan is kept in the cache directory (:func:`adaskip_compile.fitting.loss_budget.plan_within_loss`).
    It is fitted and measured on ``texts`` (documents like those to be served), or on built-in ones; or, with ``learn=20``,
    on the first 20 prompts that the model is given: everything runs in full until then, and the next one waits. Without a
    tokenizer, and with nothing else that says what to skip, nothing is skipped.

    ``plan`` is a plan or the file of one; ``options`` are the other fields of :class:`Options`. Calling
    it again with the same options and another ``plan`` switches the plan for requests that start from
    then on, and captures nothing anew. Of a wrapper that forwards ``generate`` (a ``PeftModel``) the model inside is
    compiled, which both go through; its sublayers keep the paths that they have in that model.

    Raises:
        OptionError: ``model`` is no module, or one that is wrapped by ``torch.compile``; an option is unknown or cannot
            take its value.
        ForeignFileError: The plan or profile was made for another model.
        UnknownSublayerError: The plan names a module that the model lacks.
    """
    _require_module(model)
    budget = _budget(tokenizer, texts, plan, options)
    checked = Options.from_mapping(options)
    if budget is not None:
        plan = kept_plan(model, tokenizer, budget, checked.cache_folder, texts=texts, progress=progress)
    if plan is not None and not isinstance(plan, (SkipPlan, str, os.PathLike)):
        raise OptionError(
            f"plan={plan!r}: takes a SkipPlan, the path of a file of one, or None; SkipPlan.from_scales makes one of a dict"
        )
    inner = unwrapped(model)
    source = "this plan"
    if plan is not None and not isinstance(plan, SkipPlan):
        source, plan = str(plan), SkipPlan.load(plan)
    if plan is not None:
        plan.check_paths(inner)
    session = session_for(inner, checked)
    to_learn = budget if plan is None else None
    if plan is not None or to_learn is not None:
        session.use(plan or SkipPlan.none(), source=source)
    else:
        _tell_that_nothing_is_skipped(session)
    if session.compiled is None:
        with capturing():
            if session.compiled is None:
                make_room_for_graphs()
                session.compiled = constant_floats(_compiled_forward(session, inner))
    inner._compiled_call_impl = session.compiled
    if to_learn is not None:
        inner._compiled_call_impl = PromptLearner(session, inner, tokenizer, to_learn, progress=progress)
    return model


def _budget(tokenizer: Any, texts: Iterable[str] | None, plan: Any, options: dict[str, Any]) -> Budget | None:
    """Return the budget to find a plan within, taken out of ``options``; None without a tokenizer.

    Raises:
        OptionError: There is a plan already, or nothing or too much to find one with.
    """
    if tokenizer is None:
        if texts is not None:
            raise OptionError("texts= are to find a plan with: give tokenizer= too")
        return None
    if plan is not None or options.get("plan") is not None or options.get("profile") is not None:
        raise OptionError("tokenizer= is to find a plan with, and a plan or profile is given: leave one of them out")
    budget = Budget(**{name: options.pop(name) for name in ("max_loss", "context", "learn") if name in options})
    Options(learn=budget.learn)  # checks it
    if texts is not None and budget.learn is not None:
        raise OptionError(
            "texts= are to find a plan with, and learn= finds it with what the model is given: leave one out"
        )
    return budget


def _tell_that_nothing_is_skipped(session: Session) -> None:
    """Say once of a model that nothing was asked for: no door loses quality that nobody gave up."""
    if session.options.runs_in_full and session.plan == SkipPlan.none():
        session.note(
            "nothing is skipped: there is neither a plan nor a profile; adaskip_compile.compile(model, tokenizer=tokenizer, "
            "max_loss=0.02) finds what can be skipped at a loss of 2 %"
        )


def restore(model: nn.Module) -> nn.Module:
    """Return the uncompiled model: what ``adaskip_compile.compile`` or ``model.compile`` made of it is undone in place.

    Of ``torch.compile(model)`` it is the model that was wrapped; of another wrapper, whose model inside was compiled, the
    wrapper. Captured and compiled graphs, requests, and what was learned in this process are let go; a model that was
    never compiled is returned as it is. To compile it again, do as for the first time.

    The uncompiled model knows of no skips. A request that has skipped attentions has holes in its cache, where the
    model would read keys and values of other sublayers, and no code of this package is there to refuse it: end running
    requests first, and begin new ones with a new cache.

    Raises:
        OptionError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model={model!r}: takes a torch.nn.Module, or what torch.compile made of one")
    model = getattr(model, "_orig_mod", model)
    inner = unwrapped(model)
    model._compiled_call_impl = inner._compiled_call_impl = None
    sessions = forget_sessions(inner)
    if sessions:
        for session in sessions:
            session.compiled = None
        forget_graphs(lambda known: getattr(known, "session", None) in sessions)
    return model


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"model={model!r}: takes a torch.nn.Module, which is compiled in place; for a function, "
            "torch.compile(function, backend='adaskip')"
        )
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            "model= is what torch.compile made of a model: compile that model itself, which adaskip_compile.restore(...) returns"
        )


def _compiled_forward(session: Session, model: nn.Module) -> Callable[..., Any]:
    """Return the forward of ``model`` compiled under ``session``, with the captures that earlier processes kept."""
    keeper = None
    if session.options.keep_captures:
        folder = session.options.cache_folder
        keeper = capture_keeper(session, model, folder, admit=admit, restore=restore_graph)
    if keeper is None:
        return WatchedForward(session, model)
    return keeper.compiled(model._call_impl)
