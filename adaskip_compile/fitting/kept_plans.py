"""Plans within a budget of loss, kept in the cache directory: what takes minutes is found once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaskip_compile.files.model_identity import identify, unwrapped
from adaskip_compile.files.versioned_json import digest, producer
from adaskip_compile.fitting.loss_budget import plan_within_loss
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.texts import own_domain
from adaskip_passes.errors import FileError, ForeignFileError

# Counts the changes of the search that make another plan.
_SEARCH = 3


@dataclass(frozen=True)
class Budget:
    """What prompts of ``context`` tokens may lose, in nats a token (:func:`.loss_budget.plan_within_loss`).

    ``learn`` says with how many of the model's own prompts the plan is found, in the place of texts.
    """

    max_loss: float = 0.02
    context: int = 1024
    learn: int | None = None


class KeptPlan:
    """The file of the plan of one model within one budget, found with ``texts`` or built-in ones, by these versions."""

    def __init__(self, model: nn.Module, budget: Budget, folder: Path, texts: tuple[str, ...] | None = None) -> None:
        self._identity = identify(model)
        dtype = next((parameter.dtype for parameter in model.parameters()), None)
        about = f"{budget} {dtype} {producer()} {torch.__version__} {_SEARCH}"
        about = about if texts is None else f"{about} {own_domain(texts).digest}"
        self._path = folder / "plans" / f"{self._identity.key}-{digest(about)}.json"

    def load(self) -> SkipPlan | None:
        """Return the plan; None where there is none, or it is damaged."""
        if self._identity.weights is None or not self._path.exists():
            return None
        try:
            plan = SkipPlan.load(self._path)
            plan.check(self._identity)
        except (FileError, ForeignFileError):
            return None
        return plan

    def save(self, plan: SkipPlan) -> None:
        """Keep ``plan``, unless the model cannot be told from others."""
        if self._identity.weights is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            plan.save(self._path)


def kept_plan(
    model: nn.Module,
    tokenizer: Any,
    budget: Budget,
    folder: Path,
    *,
    texts: Iterable[str] | None = None,
    progress: bool = True,
) -> SkipPlan | None:
    """Return the plan within ``budget`` from the cache ``folder``, or find it with ``texts`` and keep it there.

    None where it is to be found with prompts of the model's own, and has not been.
    """
    inner, own = unwrapped(model), None if texts is None else tuple(texts)
    kept = KeptPlan(inner, budget, folder, own)
    plan = kept.load()
    if plan is None and budget.learn is None:
        plan = find_plan(inner, tokenizer, budget, own, progress=progress)
        kept.save(plan)
    return plan


def find_plan(
    model: nn.Module, tokenizer: Any, budget: Budget, texts: Iterable[str] | None, *, progress: bool
) -> SkipPlan:
    """Return the plan of ``model`` within ``budget``."""
    how: dict[str, Any] = {"max_loss": budget.max_loss, "context": budget.context, "progress": progress}
    return plan_within_loss(model, tokenizer, texts=texts, **how)
