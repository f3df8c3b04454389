"""How well a model goes on after a prompt: likelihood of the continuation, and retrieval from the prompt.

Both are measured as a request meets them: the prompt in one call, under the plan, and what follows in calls of a few
tokens, which run in full. A dozen facts found or not say little, so the likelihood of the answers is taken too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adaskip_compile.capture.dynamo import constant_floats, make_room_for_graphs
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from adaskip_compile.lowering.lowering import interpreted
from adaskip_compile.needles import Needle
from adaskip_compile.options import Options
from adaskip_compile.planning.quality import Answers, Quality
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiling import evaluating
from adaskip_compile.runtime.session import CapturedGraph, Session
from adaskip_compile.runtime.session_backend import SessionBackend

# Tokens a call after the prompt: too few to be taken for a prompt.
_BLOCK = 64


class PromptJudge:
    """Measures plans on one model, in a session of its own: what the user has compiled is not touched.

    ``texts`` are (token ids ``(tokens,)``, number of tokens of the prompt); the rest of each text is what continues it.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: Iterable[tuple[torch.Tensor, int]],
        needles: Iterable[tuple[Needle, Sequence[int]]],
    ) -> None:
        self._model = model
        self._texts = [(ids[:prompt], ids[prompt:]) for ids, prompt in texts]
        self._needles = [(needle.ids, torch.tensor(answer)) for needle, answer in needles]
        self.session = Session(model, Options(inner=interpreted))
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

        # An own function object: its captures are not those of the user's compiled model.
        def forward(ids: torch.Tensor, **how: Any) -> Any:
            return model._call_impl(ids, use_cache=True, **how)

        make_room_for_graphs()
        self._forward = constant_floats(torch.compile(forward, backend=SessionBackend(self.session), dynamic=True))

    @property
    def prompt_graph(self) -> CapturedGraph:
        """The graph of a prompt with an empty cache, once something was measured."""
        return next(graph for graph in self.session.graphs if graph.stream.phase == "prefill")

    def compare(self, plans: Sequence[SkipPlan]) -> list[Quality]:
        """Return what each of ``plans`` loses against the full model."""
        full, answers = self.continuations(SkipPlan.none()), self.answers(SkipPlan.none())
        found = ((self.continuations(plan), self.answers(plan)) for plan in plans)
        return [Quality.of(losses, full).with_answers(got, answers) for losses, got in found]

    def continuations(self, plan: SkipPlan) -> tuple[float, ...]:
        """Return the mean negative log-likelihood of each continuation under ``plan``, in nats a token."""
        self.session.use(plan)
        with evaluating(self._model):
            return tuple(float(self._likelihoods(*one)[0].mean()) for one in self._texts)

    def answers(self, plan: SkipPlan, enough: float = 0) -> Answers:
        """Return how needles are answered under ``plan``: of the first ones, once fewer than ``enough`` can be found."""
        self.session.use(plan)
        losses: list[float] = []
        found: list[float] = []
        with evaluating(self._model):
            for asked, needle in enumerate(self._needles):
                if sum(found) + len(self._needles) - asked < enough:
                    break
                nll, best = self._likelihoods(*needle)
                losses.append(float(nll.mean()))
                found.append(float(best.all()))
        return Answers(tuple(losses), tuple(found))

    def _likelihoods(self, prompt: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return of each token of ``rest`` its negative log-likelihood, and whether it is the most likely one."""
        rows = torch.cat(list(self._logits(prompt, rest))).float()
        rest = rest.to(rows.device)
        return functional.cross_entropy(rows, rest, reduction="none"), rows.argmax(-1) == rest

    def _logits(self, prompt: torch.Tensor, rest: torch.Tensor) -> Iterator[torch.Tensor]:
        how: dict[str, Any] = {"logits_to_keep": 1} if self._keeps else {}
        result = self._forward(prompt[None].to(self._device), **how)
        yield result.logits[0, -1:]
        for start in range(0, len(rest) - 1, _BLOCK):
            ids = rest[start : min(start + _BLOCK, len(rest) - 1)]
            result = self._forward(ids[None].to(self._device), **cache_argument(self._model, cache_of(result)))
            yield result.logits[0]
