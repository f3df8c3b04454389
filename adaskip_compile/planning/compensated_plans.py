"""Give a plan the compensation that a profile holds for what it skips."""

from __future__ import annotations

from dataclasses import replace

from adaskip_compile.planning.policy_names import COMPENSATIONS
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.profiles import Profile
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import OptionError


def compensated(plan: SkipPlan, profile: Profile, compensation: str) -> SkipPlan:
    """Return ``plan`` with ``compensation`` in the place of each sublayer that it skips.

    ``scale`` leaves the plan as it is (paper Eq. 4), ``none`` makes all scales 1, and a form of map takes the one
    that ``profile`` holds. What is skipped later, by the window, keeps its scale.

    Raises:
        OptionError: There is no such compensation, or the profile has no such map of a skipped sublayer.
    """
    if compensation not in COMPENSATIONS:
        raise OptionError(f"compensation={compensation!r}: takes one of {', '.join(COMPENSATIONS)}")
    if compensation == "scale":
        return plan
    if compensation == "none":
        ramp = tuple(replace(step, skipped=_unscaled(step.skipped)) for step in plan.ramp)
        return replace(plan, skipped=_unscaled(plan.skipped), ramp=ramp, maps={})
    return replace(plan, maps={path: _map(profile, path, compensation) for path in plan.all_paths})


def _unscaled(skipped: tuple[SkippedSublayer, ...]) -> tuple[SkippedSublayer, ...]:
    return tuple(replace(sublayer, scale=1.0) for sublayer in skipped)


def _map(profile: Profile, path: str, form: str) -> StreamMap:
    for found in profile.maps.get(path, ()):
        if found.form == form:
            return found
    raise OptionError(
        f"compensation={form!r}: the profile has no such map for {path}; fit one with adaskip_compile.fit(model, "
        "profile, samples) or `adaskip profile --compensation`"
    )
