"""Find what prompts can skip within a loss with the first prompts that a model is given, in the place of texts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from adaskip_compile.fitting.kept_plans import Budget, KeptPlan, find_plan
from adaskip_compile.planning.prompt_skips import PromptSkips
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.session import Session
from adaskip_passes.errors import FileError, OptionError

log = logging.getLogger(__name__)

_LEAST = PromptSkips(()).least_rows


class PromptLearner:
    """Stands before the compiled forward of a session that skips nothing, until it has seen ``count`` prompts.

    Then a plan is found with them as texts, before the prompt at hand runs, and new requests follow it. That takes
    minutes; what other threads ask for meanwhile runs in full. Where the prompts hold too little text, it goes on to twice
    as many. What goes wrong is no error of the request, and the report tells it.
    """

    def __init__(
        self, session: Session, model: nn.Module, tokenizer: Any, budget: Budget, *, progress: bool = True
    ) -> None:
        self._session, self._model, self._tokenizer, self._budget = session, model, tokenizer, budget
        self._progress, self._count = progress, budget.learn or 1
        self._prompts: list[str] = []
        self._lock = threading.Lock()
        session.note(
            f"everything runs in full until {self._count} prompts are seen: with them is found what prompts can skip within "
            f"{100 * budget.max_loss:g} %"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        if self._lock.acquire(blocking=False):
            try:
                self._see(args, kwargs)
            finally:
                self._lock.release()
        assert self._session.compiled is not None
        return self._session.compiled(*args, **kwargs)

    def _see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is not None:
            self._session.note("a prompt that comes as embeddings is not learned from")
        seen = [self._text(ids) for ids in _prompts(args, kwargs)]
        if seen and len(self._prompts) >= self._count:
            self._find()
        self._prompts += seen

    def _text(self, ids: list[int]) -> str:
        """Return a prompt as text, without what the tokenizer puts before any text: the search puts it there again."""
        before = self._tokenizer("").input_ids
        return str(self._tokenizer.decode(ids[len(before) :] if ids[: len(before)] == before else ids))

    def _find(self) -> None:
        note = self._session.note
        note(f"{len(self._prompts)} prompts are seen: the next one waits for what prompts can skip to be found")
        try:
            with torch.inference_mode(False):
                plan = find_plan(self._model, self._tokenizer, self._budget, self._prompts, progress=self._progress)
        except OptionError as error:
            self._count *= 2
            note(f"{error}: goes on until {self._count} prompts are seen")
            return
        except Exception as error:  # the request at hand has no part in it
            log.warning("finding what prompts can skip failed", exc_info=True)
            note(f"prompts skip nothing: {type(error).__name__}: {error}")
        else:
            self._session.use(plan)
            count = 0 if plan.prompt is None else len(plan.prompt.named_paths)
            note(f"found with {len(self._prompts)} prompts: the bodies of new ones skip something in {count} sublayers")
            self._keep(plan)
        self._prompts.clear()
        if self._model._compiled_call_impl is self:
            self._model._compiled_call_impl = self._session.compiled

    def _keep(self, plan: SkipPlan) -> None:
        try:
            KeptPlan(self._model, self._budget, self._session.options.cache_folder).save(plan)
        except (FileError, OSError) as error:
            self._session.note(f"what was learned is not kept for the next process: {error}")


def _prompts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[list[int]]:
    """Yield the token ids of each row of a call that has the length of a prompt, without padding."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < _LEAST:
        return
    mask = kwargs.get("attention_mask")
    padded = isinstance(mask, torch.Tensor) and mask.dim() == 2
    kept = mask[:, -ids.shape[1] :].bool().cpu() if padded else torch.ones_like(ids, dtype=torch.bool, device="cpu")
    for row, real in zip(ids.cpu(), kept, strict=True):
        yield row[real].tolist()
