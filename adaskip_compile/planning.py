"""Planning: choose offline, from a profile, what a plan skips (AdaSkip section 3.2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaskip_compile.identity import ModelIdentity
from adaskip_compile.plans import SkippedSublayer, SkipPlan
from adaskip_compile.policies import POLICIES, largest_skip, most_similar
from adaskip_compile.profiles import SCALE_KINDS, Profile, is_finite_number
from adaskip_passes.errors import OptionError

if TYPE_CHECKING:
    from adaskip_compile.options import Options


def plan(
    profile: Profile,
    *,
    skip: int = 8,
    speedup: float | None = None,
    policy: str = "adaskip",
    context: int | None = None,
    window: int = 20,
    scale: str = "token",
) -> SkipPlan:
    """Choose offline what to skip: the sublayers, of all kinds in one ranking, that are most similar.

    The threshold beta for the online choice is the smallest similarity among them.

    Args:
        profile: What was measured of the model.
        skip: How many sublayers to skip.
        speedup: The paper's target acceleration alpha, in place of ``skip``: skips 2m sublayers, where m = M - M/alpha
            of M layers, a layer being two sublayers.
        policy: How to choose; ``adaskip`` is the only policy.
        context: Reserved for policies that depend on the context length; ``adaskip`` does not.
        window: How many decoded tokens to measure before FFNs are added; 0 adds none.
        scale: Which ratio makes up for a sublayer: ``token`` (paper Eq. 3) or ``frobenius`` (the authors' code).

    Raises:
        OptionError: An option has a value that it cannot take, or that is more than this model allows.
    """
    check_plan_options(skip=skip, speedup=speedup, policy=policy, window=window, scale=scale)
    if context is not None:
        raise OptionError(f"context={context!r} has no meaning to policy {policy!r}: leave it out")
    chosen = most_similar(profile, _count_to_skip(profile, skip, speedup))
    skipped = tuple(
        SkippedSublayer(found.path, found.kind, found.stateful, found.mean_scale(scale), found.mean_similarity)
        for found in profile.sublayers
        if found.path in chosen
    )
    beta = min((found.mean_similarity for found in profile.sublayers if found.path in chosen), default=None)
    return SkipPlan(skipped, beta, window, policy, scale, profile.model)


def plan_by_options(profile: Profile, options: Options) -> SkipPlan:
    """Return the plan that ``options`` ask for of ``profile``."""
    return plan(
        profile,
        skip=options.skip,
        speedup=options.speedup,
        policy=options.policy,
        window=options.window,
        scale=options.scale,
    )


def resolve_plan(options: Options, identity: ModelIdentity | None) -> SkipPlan | None:
    """Return the plan that ``options`` give, itself or by a profile, read from a file where they name one.

    Args:
        options: The options; None is returned where they give neither a plan nor a profile.
        identity: The model that the plan is to be used for; None where there is none to check it against.

    Raises:
        FileError: A file cannot be used, or the plan or profile was made for another model.
        OptionError: The options ask for more than the profiled model allows.
    """
    if options.plan is not None:
        given = options.plan
        found = given if isinstance(given, SkipPlan) else SkipPlan.load(given)
        if identity is not None:
            found.check(identity, source="this plan" if found is given else str(given))
        return found
    if options.profile is not None:
        named = options.profile
        profile = named if isinstance(named, Profile) else Profile.load(named)
        if identity is not None:
            profile.check(identity, source="this profile" if profile is named else str(named))
        return plan_by_options(profile, options)
    return None


def check_plan_options(*, skip: int, speedup: float | None, policy: str, window: int, scale: str) -> None:
    """Raise :class:`OptionError` for a value that no model could be planned with."""
    if type(skip) is not int or skip < 0:
        raise OptionError(f"skip={skip!r}: takes a number of sublayers, 0 or more")
    if speedup is not None and (not is_finite_number(speedup) or speedup < 1):
        raise OptionError(f"speedup={speedup!r}: takes a ratio of 1 or more, such as 1.14, or None")
    if policy not in POLICIES:
        raise OptionError(f"policy={policy!r}: takes one of {', '.join(POLICIES)}")
    if type(window) is not int or window < 0:
        raise OptionError(f"window={window!r}: takes a number of decoded tokens, 0 or more")
    if scale not in SCALE_KINDS:
        raise OptionError(f"scale={scale!r}: takes one of {', '.join(SCALE_KINDS)}")


def _count_to_skip(profile: Profile, skip: int, speedup: float | None) -> int:
    total, limit = len(profile.sublayers), largest_skip(profile)
    # 2m = 2(M - M/alpha), with M = total / 2 layers
    count = skip if speedup is None else round(total - total / speedup)
    if count <= limit:
        return count
    asked = f"skip={skip}" if speedup is None else f"speedup={speedup} skips {count} sublayers, which"
    why = f"at most {limit} of this model's {total} sublayers can be skipped"
    if limit < total - 1:
        why += f", because its most similar {limit + 1} hold every attention and one must stay"
    remedy = "" if speedup is None else f"; the largest speedup is {_floor(total / (total - limit))}"
    raise OptionError(f"{asked} is too many: {why}{remedy}")


def _floor(ratio: float) -> float:
    """Return ``ratio`` with two digits, rounded down, so that it is still allowed."""
    return math.floor(ratio * 100) / 100
