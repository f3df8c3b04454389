"""What a plan loses: by the likelihood of what follows a prompt, and by what is found in one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaskip_passes.errors import ProfileError


@dataclass(frozen=True)
class Answers:
    """What was measured of needles under one plan, one number a needle.

    ``losses`` are mean negative log-likelihoods of the codes that needles ask for, in nats a token; ``found`` is 1 where
    every token of the code is the most likely one, else 0.
    """

    losses: tuple[float, ...]
    found: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """What a plan loses against the full model.

    Args:
        loss: By how much continuations are less likely than in full, nats a token.
        loss_error: The standard error of ``loss``.
        found: The share of facts that are found in prompts; None, as what follows, where none was asked for.
        found_full: The share that the full model finds of the same facts.
        answer_loss: By how much their answers are less likely than in full, nats a token.
    """

    loss: float
    loss_error: float
    found: float | None = None
    found_full: float | None = None
    answer_loss: float | None = None

    @classmethod
    def of(cls, losses: Sequence[float], full: Sequence[float]) -> Quality:
        """Return what likelihoods of continuations say, given one by one as :meth:`PromptJudge.continuations` does.

        Raises:
            ProfileError: One is no finite number: the stream overflows.
        """
        differences = [one - other for one, other in zip(losses, full, strict=True)]
        if not all(map(math.isfinite, differences)):
            raise ProfileError("a likelihood is no finite number: the residual stream overflows")
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
        return cls(statistics.fmean(differences), error)

    def with_answers(self, got: Answers, full: Answers) -> Quality:
        """Return it with what answers say; ``got`` may have the first ones of ``full`` alone."""
        asked = len(got.found)
        return replace(
            self,
            found=statistics.fmean(got.found),
            found_full=statistics.fmean(full.found[:asked]),
            answer_loss=statistics.fmean(got.losses) - statistics.fmean(full.losses[:asked]),
        )

    @property
    def perplexity(self) -> str:
        """The change of perplexity in per cent, with its standard error, as text."""
        return f"{100 * math.expm1(self.loss):+.2f} % (+-{100 * self.loss_error:.2f})"

    @property
    def retrieval(self) -> str:
        """What share of facts was found, of what the full model finds, as text."""
        if self.found is None or self.found_full is None:
            return "-"
        return f"{100 * self.found:.0f} % of {100 * self.found_full:.0f} %"
