"""Tune the maps of a plan together, so that the model that skips predicts what the full model predicts.

Fitted one by one, each map imitates one branch as the full model has it. Here all of them are adjusted at once by
gradient descent on the divergence between both models' predictions (distillation, arXiv 1503.02531). The model's own
weights stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.files.model_identity import identify, unwrapped
from adaskip_compile.planning.replacement_values import replacement_values
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiling import evaluating, show_progress, token_ids
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import CaptureError, OptionError, ProfileError
from adaskip_passes.ir.module_paths import naming
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.pipelines import canonicalised
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.skip_sublayers import SkipSublayers

# Relative to the root mean square of each tensor: one rate for weights and shifts of any model.
_RATE = 0.03
_WARM_UP = 5
_HELD_OUT = 4


def tune(
    model: nn.Module,
    plan: SkipPlan,
    samples: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    steps: int = 200,
    tokens: int = 256,
    max_samples: int = 64,
    progress: bool = True,
) -> SkipPlan:
    """Return ``plan`` with its maps tuned on ``samples``; they are those of this one skip set from then on.

    Each step takes ``tokens`` tokens of one sample, costs about four forward passes over them, and keeps the
    activations of one. Every fourth sample is held out: where the tuned maps do no better on it than those of ``plan``,
    ``plan`` is returned as it is.

    Args:
        model: The model that the plan is for.
        plan: A plan with maps (``compensation="low_rank"`` or another form).
        samples: Texts, which need a ``tokenizer``, or token ids; as mixed as those to be served.
        tokenizer: Turns texts into token ids.
        steps: How many steps to take.
        tokens: Tokens a step.
        max_samples: At most so many of ``samples`` are used.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: The plan has no maps, or ``steps`` or ``tokens`` is no number of them.
        ForeignFileError: The plan is of another model.
        ProfileError: Fewer than two samples, texts without a tokenizer, or a sample too short.
        CaptureError: The model is not captured as one graph.
    """
    if not plan.maps:
        raise OptionError("the plan has no maps to tune; make one with plan(..., compensation='low_rank')")
    for name, value, least in (("steps", steps, 1), ("tokens", tokens, 2)):
        if type(value) is not int or value < least:
            raise OptionError(f"{name}={value!r}: takes a number, {least} or more")
    model = unwrapped(model)
    plan.check(identify(model))
    plan.check_paths(model)
    ids = list(token_ids(samples, tokenizer, max_samples))
    if len(ids) < 2:
        raise ProfileError(f"tuning needs two samples or more, one of them to judge by; there are {len(ids)}")
    held_out = [one[:, :tokens] for one in ids[_HELD_OUT - 1 :: _HELD_OUT] or ids[-1:]]
    learned = [one for place, one in enumerate(ids) if place % _HELD_OUT != _HELD_OUT - 1]
    with evaluating(model), _frozen(model):
        pair = _Pair(model, plan)
        before = pair.loss(held_out)
        _descend(pair, learned, steps, tokens, progress)
        after = pair.loss(held_out)
    return replace(plan, maps=pair.maps()) if after < before else plan


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have no parameter of ``model`` take part in gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class _Pair:
    """The full model and the one that skips, and how far apart their predictions are.

    ``leaves`` are the tensors of the maps, by path and name, in float32.
    """

    def __init__(self, model: nn.Module, plan: SkipPlan) -> None:
        self.plan = plan
        self.device = next(parameter.device for parameter in model.parameters())
        self.leaves = {
            path: {name: tensor.to(self.device, copy=True).requires_grad_() for name, tensor in one.tensors.items()}
            for path, one in plan.maps.items()
        }
        self._skipping = False

        def forward(ids: torch.Tensor) -> torch.Tensor:
            return model._call_impl(ids).logits

        self._forward = torch.compile(forward, backend=naming(model, self._backend), dynamic=True)

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        straight = canonicalised(gm)
        stream = straight.stream
        if stream.problems:
            raise CaptureError(f"nothing to tune: {'; '.join(stream.problems)}")
        paths = tuple(path for path in stream.paths if path in self.plan.scales)
        skips = SkipSublayers(paths, self.plan.map_forms(paths))
        skipping = run_pipeline(straight.gm, stream, (skips, EliminateDeadCode()))

        def run(*values: Any) -> Any:
            if not self._skipping:
                return gm.forward(*values)
            added = replacement_values(skipping.added, stream, self.plan.scales, self.leaves)
            return skipping.gm.forward(*values, *added)

        return run

    def divergence(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence of the two over the tokens of ``ids``, in nats; gradients reach ``leaves``."""
        ids = ids.to(self.device)
        self._skipping = False
        with torch.no_grad():
            wanted = self._forward(ids).float().log_softmax(-1)
        self._skipping = True
        found = self._forward(ids).float().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    def loss(self, samples: Sequence[torch.Tensor]) -> float:
        """Return the mean divergence over ``samples``."""
        return sum(self.divergence(ids).item() for ids in samples) / len(samples)

    def maps(self) -> dict[str, StreamMap]:
        """Return the maps as they are now."""
        return {
            path: StreamMap(one.form, {name: leaf.detach().cpu() for name, leaf in self.leaves[path].items()}, None)
            for path, one in self.plan.maps.items()
        }


def _descend(pair: _Pair, samples: Sequence[torch.Tensor], steps: int, tokens: int, progress: bool) -> None:
    leaves = [leaf for named in pair.leaves.values() for leaf in named.values()]
    rates = [_RATE * leaf.detach().square().mean().sqrt().clamp_min(1e-8).item() for leaf in leaves]
    groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    chance = torch.Generator().manual_seed(0)
    for step in show_progress(range(steps), steps, progress, "tuning"):
        sample = samples[step % len(samples)]
        start = int(torch.randint(0, max(1, sample.shape[1] - tokens + 1), (1,), generator=chance))
        with torch.enable_grad():
            pair.divergence(sample[:, start : start + tokens]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
