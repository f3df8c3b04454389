"""Candidates: the plans that a sweep or a study compares, by policy, number of sublayers and compensation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import adaskip_compile
from adaskip_compile.plans import SkipPlan
from adaskip_compile.profiles import Profile
from adaskip_passes.errors import OptionError

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


def make_plan(
    profile: Profile, *, skip: int, policy: str = "adaskip", compensation: str = "scale", **options: Any
) -> SkipPlan:
    """Return the plan of a policy and a compensation, by name.

    Raises:
        OptionError: A name is unknown, or more is asked for than this model allows.
    """
    if compensation != "scale":
        raise OptionError(f"compensation={compensation!r}: takes scale")
    return adaskip_compile.plan(profile, skip=skip, policy=policy, **options)


def make_candidates(
    profile: Profile, skips: Iterable[int], policies: Sequence[str], compensations: Sequence[str], **options: Any
) -> tuple[Candidate, ...]:
    """Return the full model, then each combination; ``options`` go to the planner.

    Raises:
        OptionError: A name is unknown, or more is asked for than this model allows.
    """
    found = [Candidate("", 0, "", SkipPlan.none())]
    for policy, compensation, skip in product(policies, compensations, sorted({*skips} - {0})):
        plan = make_plan(profile, skip=skip, policy=policy, compensation=compensation, **options)
        found.append(Candidate(policy, skip, compensation, plan))
    return tuple(found)
