"""How well a model goes on after a prompt: likelihood of the continuation, and retrieval from the prompt.

Both are measured as a request meets them: the prompt in one call, under the plan, and what follows in calls of a few
tokens, which run in full. A dozen facts found or not say little, so the likelihood of the answers is taken too.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adaskip_compile.capture import constant_floats, make_room_for_graphs
from adaskip_compile.dispatch import Dispatcher
from adaskip_compile.evaluation.needles import Needle
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from adaskip_compile.options import Options
from adaskip_compile.plans import SkipPlan
from adaskip_compile.profiling import evaluating
from adaskip_compile.session_backend import SessionBackend
from adaskip_compile.sessions import Session

# Tokens a call after the prompt: too few to be taken for a prompt.
_BLOCK = 64


@dataclass(frozen=True)
class PromptScores:
    """What was measured under one plan, one number a text or needle.

    ``continuation`` and ``answers`` are mean negative log-likelihoods in nats a token, of the text after a prompt and of
    the code that a needle asks for; ``found`` is 1 where every token of the code is the most likely one, else 0.
    """

    continuation: tuple[float, ...]
    answers: tuple[float, ...]
    found: tuple[float, ...]

    def loss_against(self, full: PromptScores) -> tuple[float, float]:
        """Return by how much the continuations are less likely than in ``full``, nats a token, and its standard error."""
        return _mean_and_error([one - other for one, other in zip(self.continuation, full.continuation, strict=True)])


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), error


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
        self.session = Session(model, Options(inner="eager"))
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

        # An own function object: its captures are not those of the user's compiled model.
        def forward(ids: torch.Tensor, **how: Any) -> Any:
            return model._call_impl(ids, use_cache=True, **how)

        make_room_for_graphs()
        self._forward = constant_floats(torch.compile(forward, backend=SessionBackend(self.session), dynamic=True))

    @property
    def prompt_graph(self) -> Dispatcher:
        """The graph of a prompt with an empty cache, once something was measured."""
        return next(graph for graph in self.session.graphs if graph.stream.phase == "prefill")

    def measure(self, plan: SkipPlan) -> PromptScores:
        """Return the scores under ``plan``."""
        self.session.use(plan)
        with evaluating(self._model):
            texts = [self._likelihoods(*one) for one in self._texts]
            needles = [self._likelihoods(*one) for one in self._needles]
        return PromptScores(
            tuple(float(losses.mean()) for losses, _ in texts),
            tuple(float(losses.mean()) for losses, _ in needles),
            tuple(float(best.all()) for _, best in needles),
        )

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
