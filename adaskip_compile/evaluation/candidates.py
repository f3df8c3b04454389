"""Candidates: the plans that a sweep or a study compares, by policy, number of sublayers and compensation.

Those of the policy ``prompt`` skip for the body of a prompt alone, keys and values kept, the deepest layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from adaskip_compile.files.model_identity import identify
from adaskip_compile.fitting.depths import Depths, layers_from_the_end
from adaskip_compile.fitting.fit import fit
from adaskip_compile.fitting.joint_order import order_by_loss
from adaskip_compile.fitting.sequence import SequenceFitter
from adaskip_compile.inspection.phase_graphs import capture_phases
from adaskip_compile.planning.planner import plan
from adaskip_compile.planning.policy_names import COMPENSATIONS, POLICIES
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.errors import OptionError
from adaskip_passes.specialise.stream_maps import FORMS

FULL = "full"


@dataclass(frozen=True)
class Candidate:
    """One plan to measure; ``policy`` and ``compensation`` are empty where nothing is skipped.

    ``depths`` are of the policy ``prompt``: of how many deepest layers the attentions are skipped, and of how many the FFNs.
    """

    policy: str
    skip: int
    compensation: str
    plan: SkipPlan
    depths: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What tables call it, such as ``adaskip/8/scale`` and ``prompt/8+11/low_rank``; the full model is ``full``."""
        much = str(self.skip) if self.depths is None else _text(self.depths)
        return f"{self.policy}/{much}/{self.compensation}" if self.policy else FULL


def check_names(policies: Iterable[str], compensations: Iterable[str]) -> None:
    """Raise :class:`OptionError` for a policy or a compensation that there is not."""
    for what, names, known in (("policy", policies, POLICIES), ("compensation", compensations, COMPENSATIONS)):
        for name in names:
            if name not in known:
                raise OptionError(f"{what}={name!r}: takes one of {', '.join(known)}")


def complete_profile(
    model: Any,
    profile: Profile,
    samples: Sequence[torch.Tensor],
    policies: Iterable[str],
    compensations: Iterable[str],
    *,
    most: int,
    progress: bool = True,
) -> Profile:
    """Return ``profile`` with the maps and the joint order that the named plans need, learned from ``samples``.

    ``most`` sublayers are put in order. What the profile holds already is not learned again.
    """
    every = [found.path for found in profile.sublayers]
    held = {(path, one.form) for path, ones in profile.maps.items() for one in ones}
    forms = [name for name in compensations if name in FORMS]
    if not {*product(every, forms)} <= held:
        profile = fit(
            model, profile, samples, forms=forms, sublayers=every, max_samples=len(samples), progress=progress
        )
    if "loss_greedy" in policies and len(profile.joint_order) < most:
        tried_with = next(iter(forms), "scale")
        profile = order_by_loss(model, profile, samples, compensation=tried_with, most=most, progress=progress)
    return profile


def make_candidates(
    profile: Profile, skips: Iterable[int], policies: Sequence[str], compensations: Sequence[str], **options: Any
) -> tuple[Candidate, ...]:
    """Return the full model, then each combination; ``options`` go to the planner.

    Raises:
        OptionError: A name is unknown, or more is asked for than this model allows.
    """
    check_names(policies, compensations)
    found = [Candidate("", 0, "", SkipPlan.none())]
    for policy, compensation, skip in product(policies, compensations, sorted({*skips} - {0})):
        made = plan(profile, skip=skip, policy=policy, compensation=compensation, **options)
        found.append(Candidate(policy, skip, compensation, made))
    return tuple(found)


def make_prompt_candidates(
    model: Any,
    samples: Sequence[torch.Tensor],
    depths: Iterable[tuple[int, int]],
    kept: Callable[[str], Path],
    *,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Candidate, ...]:
    """Return what skips for the body of a prompt the attentions and FFNs of the deepest layers but the last, by ``depths``.

    Maps are fitted in sequence on ``samples``, and kept in the file that ``kept`` names for each (``8+11``): a plan that is
    there is not fitted again. ``progress`` is called after each.

    Raises:
        OptionError: A depth is greater than the model has layers below the last.
        FileError: What is kept is damaged, or of another model.
    """
    asked = sorted({*depths} - {(0, 0)})
    if not asked:
        return ()
    stream = capture_phases(model)[0].stream
    layers = layers_from_the_end(stream)
    for one in asked:
        if max(one) > len(layers):
            raise OptionError(f"depths={_text(one)}: this model has {len(layers)} layers below the last")
        if not Depths(*one).skipped(layers):
            raise OptionError(f"depths={_text(one)}: so deep there is neither attention nor FFN to skip")
    identity = identify(model)
    fitter: SequenceFitter | None = None
    found = []
    for one in asked:
        file = kept(_text(one))
        if file.exists():
            made = SkipPlan.load(file)
            made.check(identity, source=str(file))
        else:
            if fitter is None:
                fitter = SequenceFitter(model, samples, max_samples=len(samples))
                fitter.begin_at(Depths(*(max(depth) for depth in zip(*asked, strict=True))).skipped(layers))
            skips = fitter.fit(Depths(*one).skipped(layers), progress=False)
            made = replace(SkipPlan.none(), policy="prompt", model=identity, prompt=skips)
            made.save(file)
        progress()
        assert made.prompt is not None
        found.append(Candidate("prompt", len(made.prompt.paths), "low_rank", made, one))
    return tuple(found)


def _text(depths: tuple[int, int]) -> str:
    return f"{depths[0]}+{depths[1]}"
