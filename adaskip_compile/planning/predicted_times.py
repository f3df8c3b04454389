"""What skipping each sublayer is predicted to save: the times that a plan for a goal is made from."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from adaskip_compile.costs.timers import ROOFLINES, Measured, Timer, predict
from adaskip_compile.planning.replacement_costs import replacement_seconds
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.analysis.cost import Cost
from adaskip_passes.errors import OptionError


@dataclass(frozen=True)
class PredictedTimes:
    """Seconds at one context length, by phase: of the whole model, and what skipping each sublayer saves."""

    full: Mapping[str, float]
    saved: Mapping[str, Mapping[str, float]]

    def speedup(self, phase: str, skipped: Collection[str]) -> float:
        """Return how many times faster ``phase`` is without ``skipped``."""
        rest = self.full[phase] - math.fsum(self.saved[phase][path] for path in skipped)
        return self.full[phase] / rest if rest > 0 else math.inf


def predict_times(
    profile: Profile,
    context: int,
    times: Timer | str | os.PathLike[str] | None = None,
    replacements: Mapping[str, Cost] | None = None,
) -> PredictedTimes:
    """Return what each phase of the profiled model takes at ``context`` tokens.

    Args:
        profile: What was measured of the model; its ``costs`` are needed unless ``times`` were measured.
        context: Tokens of the prefill, or before the decoded token.
        times: What tells times, or the file of a calibration; by default a roofline of round figures.
        replacements: By path, what stands for a sublayer that is skipped costs beyond a scale
            (:mod:`adaskip_compile.planning.replacement_costs`). It is taken off what skipping saves.

    Raises:
        OptionError: The profile holds no costs, or the times are of another model.
        FileError: The file cannot be used.
    """
    timer = times if times is None or not isinstance(times, (str, os.PathLike)) else Measured.load(times)
    if isinstance(timer, Measured):
        found = _measured(profile, timer, context)
    else:
        if profile.costs is None:
            raise OptionError(
                "context= needs to know what the sublayers cost, and this profile does not say: it was learned from "
                "requests or made by an earlier version. Profile again, or give times= that were measured"
            )
        timer = timer or ROOFLINES.get(profile.costs.device, ROOFLINES["cpu"])
        found = _by_costs(profile, timer, context)
    return _less_replacements(profile, found, timer, context, replacements) if replacements else found


def _measured(profile: Profile, timer: Measured, context: int) -> PredictedTimes:
    paths = [path for group in timer.groups for path in group]
    if not paths:
        raise OptionError(
            "these times do not say of which sublayers they are: an earlier version measured them; measure again with "
            "`adaskip inspect MODEL --calibrate --calibration PATH`"
        )
    if sorted(paths) != sorted(sublayer.path for sublayer in profile.sublayers):
        raise OptionError("these times were measured on another model: its sublayers are not those of the profile")
    full: dict[str, float] = {}
    saved: dict[str, dict[str, float]] = {}
    for phase in timer.tables:
        each = [timer.seconds_of(index, phase, context) for index in range(len(timer.groups) + 1)]
        saved[phase] = {path: each[index] for index, group in enumerate(timer.groups) for path in group}
        full[phase] = each[-1] + math.fsum(saved[phase].values())
    return PredictedTimes(full, saved)


def _by_costs(profile: Profile, timer: Timer, context: int) -> PredictedTimes:
    costs = profile.costs
    assert costs is not None
    full: dict[str, float] = {}
    saved: dict[str, dict[str, float]] = {}
    for phase in costs.rest:
        time = predict(costs, timer, phase, context)
        full[phase] = time.full
        saved[phase] = {one.path: time.groups[one.group] for one in costs.sublayers}
    return PredictedTimes(full, saved)


def _less_replacements(
    profile: Profile, found: PredictedTimes, timer: Timer, context: int, replacements: Mapping[str, Cost]
) -> PredictedTimes:
    if profile.costs is None:
        raise OptionError(
            "what stands for a sublayer costs something, and this profile does not know costs: profile again"
        )
    group = {one.path: profile.costs.groups[one.group] for one in profile.costs.sublayers}
    saved = {
        phase: {
            path: seconds
            - (
                replacement_seconds(replacements[path], timer, group[path], phase, context, device=profile.costs.device)
                if path in replacements
                else 0.0
            )
            for path, seconds in each.items()
        }
        for phase, each in found.saved.items()
    }
    return PredictedTimes(found.full, saved)
