"""Candidates: the plans that a sweep or a study compares, by policy, number of sublayers and compensation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from adaskip_compile.fitting.fit import fit
from adaskip_compile.fitting.joint_order import order_by_loss
from adaskip_compile.planning.planner import plan
from adaskip_compile.planning.policy_names import COMPENSATIONS, POLICIES
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.errors import OptionError
from adaskip_passes.specialise.stream_maps import FORMS

FULL = "full"


@dataclass(frozen=True)
class Candidate:
    """One plan to measure; ``policy`` and ``compensation`` are empty where nothing is skipped."""

    policy: str
    skip: int
    compensation: str
    plan: SkipPlan

    @property
    def name(self) -> str:
        """What tables call it, such as ``adaskip/8/scale``; the full model is ``full``."""
        return f"{self.policy}/{self.skip}/{self.compensation}" if self.policy else FULL


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
