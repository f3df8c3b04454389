"""Which sublayers to skip together: a greedy order by what skipping does to the model's predictions.

How similar a sublayer is tells what it does to the residual stream, not what the rest of the model makes of it, and
the effects of several do not add up. So the order is found by trying: of all candidates, the one whose skipping moves
the predictions least is skipped for good, and the others are tried again on top of it (as SLEB, arXiv 2402.09025,
does with whole blocks). Most candidates only get worse as others go, so an old result is a bound on the new one, and
few have to be tried again in each step (lazy greedy, Minoux 1978).
"""

from __future__ import annotations

import heapq
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adaskip_compile.capture.dynamo import constant_floats, make_room_for_graphs
from adaskip_compile.display.progress import show_progress
from adaskip_compile.files.model_identity import identify
from adaskip_compile.lowering.lowering import interpreted
from adaskip_compile.options import Options
from adaskip_compile.planning.compensated_plans import compensated
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import JointStep, Profile
from adaskip_compile.profiling.profiling import evaluating, token_ids
from adaskip_compile.runtime.session import Session
from adaskip_compile.runtime.session_backend import SessionBackend
from adaskip_passes.errors import OptionError, PassError, ProfileError

# The predictions of one token in so many are compared: neighbours say much the same.
_STRIDE = 8


def order_by_loss(
    model: nn.Module,
    profile: Profile,
    samples: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    compensation: str = "scale",
    most: int = 24,
    candidates: int | None = None,
    max_samples: int = 8,
    max_tokens: int = 512,
    progress: bool = True,
) -> Profile:
    """Return ``profile`` with a joint order: which sublayers to skip one after another, and the loss after each.

    The loss is the mean Kullback-Leibler divergence from the full model's next-token distribution to that of the
    model that skips, in nats a token: by how much the log-likelihood of the full model's own texts falls. Takes about
    ``candidates + 4 * most`` forward passes over the samples.

    Args:
        model: The profiled model.
        profile: What was measured of it, with the maps of :func:`adaskip_compile.fit` if ``compensation`` is one.
        samples: Texts, which need a ``tokenizer``, or token ids.
        tokenizer: Turns texts into token ids.
        compensation: What stands in the place of the skipped sublayers while they are tried.
        most: How many sublayers to put in order.
        candidates: How many to choose among, the most similar ones; by default twice ``most``.
        max_samples: At most so many of ``samples`` are used.
        max_tokens: At most so many tokens of each.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: The profile has no such compensation, or fewer sublayers than are asked for.
        ForeignFileError: The profile is of another model.
        ProfileError: No samples, texts without a tokenizer, or a sample too short.
    """
    profile.check(identify(model))
    limit = len(profile.sublayers) - 1
    if not 0 < most <= limit:
        raise OptionError(f"most={most!r}: takes a number of sublayers from 1 to {limit}")
    named = [found.path for found in profile.ranking()[: max(most, 2 * most if candidates is None else candidates)]]
    if compensation not in ("none", "scale"):
        named = [path for path in named if path in profile.maps]
    ids = [one[:, :max_tokens] for one in token_ids(samples, tokenizer, max_samples)]
    if not ids:
        raise ProfileError("no samples to try skips on: give at least one text or tensor of token ids")
    with evaluating(model):
        judge = _Judge(model, ids)
        trial = _Trial(profile, compensation, judge.loss)
        steps = tuple(_order(trial, named, most, progress))
    return replace(profile, joint_order=steps)


class _Judge:
    """Tells how far the predictions under a plan are from those of the full model."""

    def __init__(self, model: nn.Module, samples: Sequence[torch.Tensor]) -> None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        # An own session, and an own function object: the user's compiled model is not touched.
        self._session = Session(model, Options(inner=interpreted))
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

        def forward(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            if keeps:
                return model._call_impl(ids, logits_to_keep=places).logits
            return model._call_impl(ids).logits[:, places]

        make_room_for_graphs()
        self._forward = constant_floats(torch.compile(forward, backend=SessionBackend(self._session), dynamic=True))
        self._inputs = [(ids.to(device), torch.arange(_STRIDE - 1, ids.shape[1], _STRIDE)) for ids in samples]
        self._wanted = [one.exp() for one in self._predictions(SkipPlan.none())]
        self._entropy = [(one * one.clamp_min(1e-30).log()).sum(-1) for one in self._wanted]

    def _predictions(self, plan: SkipPlan) -> Iterator[torch.Tensor]:
        self._session.use(plan)
        for ids, places in self._inputs:
            yield self._forward(ids, places.to(ids.device)).float().log_softmax(-1)

    def loss(self, plan: SkipPlan) -> float:
        """Return the mean divergence under ``plan``, in nats a token; infinity where it cannot run."""
        try:
            parts = [
                (entropy - (wanted * found).sum(-1)).flatten()
                for wanted, entropy, found in zip(self._wanted, self._entropy, self._predictions(plan), strict=True)
            ]
        except PassError:  # a sublayer that others read from cannot go alone
            return math.inf
        return torch.cat(parts).mean().item()


class _Trial:
    """The loss of skipping some sublayers of a profile."""

    def __init__(self, profile: Profile, compensation: str, loss: Callable[[SkipPlan], float]) -> None:
        self.profile, self.compensation, self._loss = profile, compensation, loss
        self._scales = {found.path: found.mean_scale() for found in profile.sublayers}
        self._attentions = {found.path for found in profile.sublayers if found.kind == "attention"}

    def __call__(self, paths: Sequence[str]) -> float:
        """Return the loss with ``paths`` skipped; infinity where no attention is left to count the tokens."""
        if self._attentions and self._attentions <= {*paths}:
            return math.inf
        plan = SkipPlan.from_scales({path: self._scales[path] for path in paths})
        return self._loss(compensated(plan, self.profile, self.compensation))


def _order(trial: _Trial, named: Sequence[str], most: int, progress: bool) -> Iterator[JointStep]:
    chosen: list[str] = []
    reached = 0.0
    alone = show_progress(named, len(named), progress, "trying each")
    # (how much worse it made things, with how many skipped that was, path)
    queue = [(trial([path]), 0, path) for path in alone]
    heapq.heapify(queue)
    for _ in show_progress(range(most), most, progress, "ordering"):
        while queue and queue[0][1] < len(chosen):
            _, _, path = heapq.heappop(queue)
            heapq.heappush(queue, (trial([*chosen, path]) - reached, len(chosen), path))
        if not queue or math.isinf(queue[0][0]):
            return
        worse, _, path = heapq.heappop(queue)
        chosen.append(path)
        reached += worse
        yield JointStep(path, trial.compensation, reached)
