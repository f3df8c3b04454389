"""Plan for a goal: reach a speed-up in prefill and in decode at the least predicted damage, or stay within a loss.

Which sublayers to skip is a choice among all of them, for prefill and decode at once: a stateless sublayer may be
skipped in one phase and run in the other, a stateful one that is skipped in prefill stays skipped. Damages add up,
one half for each phase; times add up. The least damage that saves enough time in both phases is then a knapsack
with two weights, :func:`adaskip_compile.planning.knapsack.cover`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from adaskip_compile.costs.timers import Timer
from adaskip_compile.planning.knapsack import Option, cover
from adaskip_compile.planning.policies import (
    LAYER_POLICIES,
    choose,
    joint_order,
    keeps_enough,
    largest_skip,
    layer_choices,
)
from adaskip_compile.planning.predicted_times import PredictedTimes, predict_times
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.analysis.cost import Cost
from adaskip_passes.errors import OptionError

# The policies that weigh damage against time.
WEIGHING = ("adaskip", "loss_greedy")
# Sublayers of no damage would be skipped for no time at all.
_LEAST_DAMAGE = 1e-9


@dataclass(frozen=True)
class Choice:
    """What to skip in prefill and what in decode."""

    prefill: frozenset[str]
    decode: frozenset[str]

    def of(self, phase: str) -> frozenset[str]:
        """Return what to skip in ``phase``."""
        return self.prefill if phase == "prefill" else self.decode


def reach_speedup(
    profile: Profile,
    speedup: float,
    context: int,
    *,
    policy: str = "adaskip",
    times: Timer | str | os.PathLike[str] | None = None,
    phase: str = "both",
    seed: int = 0,
    replacements: Mapping[str, Cost] | None = None,
) -> Choice:
    """Return what to skip for prefill and decode to be ``speedup`` times as fast at ``context`` tokens, as predicted.

    ``adaskip`` and ``loss_greedy`` weigh each sublayer's damage against the time that it saves: 1 - similarity, or
    what skipping it adds to the loss in the joint order. Of the other policies it is the smallest number of
    sublayers that does. ``phase`` restricts the goal to one phase; the other arguments are those of
    :func:`~adaskip_compile.planning.predicted_times.predict_times`. With ``replacements``, those two choose only among the
    sublayers that have one.

    Raises:
        OptionError: It cannot be reached; the message says what can.
        FileError: The file of ``times`` cannot be used.
    """
    predicted = predict_times(profile, context, times, replacements)
    phases = tuple(one for one in ("prefill", "decode") if phase in (one, "both") and one in predicted.full)
    if not phases:
        raise OptionError(f"phase={phase!r}: nothing is known of what it takes; there is {', '.join(predicted.full)}")
    # Of two ways to add the same times up, one may fall short by the last bit.
    goal = speedup * (1 - 1e-9)
    if policy not in WEIGHING:
        choices = _by_count(profile, policy, phase, seed)
    else:
        choices = [_most(profile, predicted, _candidates(profile, policy, replacements), phases)]
    reached = [choice for choice in choices if all(predicted.speedup(one, choice.of(one)) >= goal for one in phases)]
    if not reached:
        raise _out_of_reach(predicted, choices, speedup, context, phases, policy)
    if policy not in WEIGHING:
        return reached[0]
    return _cheapest(profile, predicted, _candidates(profile, policy, replacements), phases, goal) or reached[0]


def within_loss(profile: Profile, max_loss: float, compensation: str) -> tuple[str, ...]:
    """Return the longest beginning of the joint order that loses at most ``max_loss`` nats a token with ``compensation``.

    Raises:
        OptionError: The profile holds no joint order, or one whose losses are those of another compensation.
    """
    order = joint_order(profile)
    tried = next((step.compensation for step in profile.joint_order if step.compensation != compensation), None)
    if tried is not None:
        raise OptionError(
            f"max_loss={max_loss} goes by the joint order, whose losses were measured with compensation={tried!r} and not "
            f"with {compensation!r}: give compensation={tried!r}, or order again with adaskip_compile.order_by_loss(model, "
            f"profile, samples, compensation={compensation!r})"
        )
    count = max((count for count, (_, loss) in enumerate(order, 1) if loss <= max_loss), default=0)
    return choose(profile, "loss_greedy", min(count, largest_skip(profile, "loss_greedy")))


def _candidates(profile: Profile, policy: str, replacements: Mapping[str, Cost] | None) -> dict[str, float]:
    """Return the predicted damage of each sublayer that may be skipped, by path; with ``replacements``, only of those."""
    if policy == "loss_greedy":
        order = joint_order(profile)
        before = (0.0, *(loss for _, loss in order))
        damages = {path: loss - base for (path, loss), base in zip(order, before, strict=False)}
    else:
        damages = {found.path: 1.0 - found.mean_similarity for found in profile.sublayers}
    if replacements is not None:
        damages = {path: damage for path, damage in damages.items() if path in replacements}
    # What other sublayers read the values of cannot go without them.
    shared = {one.path for one in profile.costs.sublayers if one.shared_with} if profile.costs is not None else set()
    kept = _kept(profile, damages)
    return {path: max(damage, _LEAST_DAMAGE) for path, damage in damages.items() if path not in shared and path != kept}


def _kept(profile: Profile, damages: Mapping[str, float]) -> str | None:
    """Return the sublayer that stays for a model to run at all: of those that can be the last one, the most damaging."""
    if keeps_enough(profile, tuple(damages)):
        return None
    attentions = [found.path for found in profile.sublayers if found.kind == "attention" and found.path in damages]
    return max(attentions or damages, key=lambda path: damages[path])


def _by_count(profile: Profile, policy: str, phase: str, seed: int) -> list[Choice]:
    """Return what ``policy`` skips, by itself in ``phase``: ever more sublayers, as long as the model can run."""
    if policy in LAYER_POLICIES:
        sets: Sequence[tuple[str, ...]] = layer_choices(profile, policy)
    else:
        counts = range(largest_skip(profile, policy, seed) + 1)
        sets = [choose(profile, policy, count, seed) for count in counts]
    return [in_phase(profile, chosen, phase) for chosen in sets if keeps_enough(profile, chosen)]


def in_phase(profile: Profile, chosen: Collection[str], phase: str) -> Choice:
    """Return what each phase skips where ``chosen`` is to be skipped in ``phase``: ``both``, ``prefill`` or ``decode``.

    Stateful sublayers that are skipped in prefill have no cache, and stay skipped.
    """
    if phase == "decode":
        return Choice(frozenset(), frozenset(chosen))
    stateful = {sublayer.path for sublayer in profile.sublayers if sublayer.stateful}
    return Choice(frozenset(chosen), frozenset(chosen) & stateful if phase == "prefill" else frozenset(chosen))


def _options(
    profile: Profile, predicted: PredictedTimes, candidates: Mapping[str, float], phases: Sequence[str]
) -> list[tuple[str, list[tuple[frozenset[str], Option]]]]:
    """Return for each candidate the ways to skip it: in which phases, at what damage, and what shares of time it saves."""
    stateful = {sublayer.path for sublayer in profile.sublayers if sublayer.stateful}
    found = []
    for path, damage in candidates.items():
        ways = [frozenset({"prefill", "decode"}), frozenset({"decode"}), frozenset({"prefill"})]
        if path in stateful:
            ways.pop()
        shares = {one: predicted.saved[one][path] / predicted.full[one] for one in phases}
        options = [(frozenset(), Option(0.0, (0.0, 0.0)))]
        for way in ways:
            saved = {one: shares.get(one, 0.0) if one in way else 0.0 for one in ("prefill", "decode")}
            # What stands for a sublayer may be dearer than the sublayer: then skipping it is no option.
            if all(saved[one] > 0 for one in way & {*phases}) and way & {*phases}:
                options.append((way, Option(damage * len(way) / 2, (saved["prefill"], saved["decode"]))))
        found.append((path, options))
    return found


def _most(
    profile: Profile, predicted: PredictedTimes, candidates: Mapping[str, float], phases: Sequence[str]
) -> Choice:
    """Return the choice that skips all that can be skipped."""
    skipped: dict[str, set[str]] = {"prefill": set(), "decode": set()}
    for path, options in _options(profile, predicted, candidates, phases):
        for phase in max((way for way, _ in options), key=len):
            skipped[phase].add(path)
    return Choice(frozenset(skipped["prefill"]), frozenset(skipped["decode"]))


def _cheapest(
    profile: Profile,
    predicted: PredictedTimes,
    candidates: Mapping[str, float],
    phases: Sequence[str],
    goal: float,
) -> Choice | None:
    """Return the choice of least damage that reaches ``goal`` in ``phases``; None where only about all of them do."""
    options = _options(profile, predicted, candidates, phases)
    need = tuple(1 - 1 / goal if one in phases else 0.0 for one in ("prefill", "decode"))
    taken = cover([[option for _, option in ways] for _, ways in options], (need[0], need[1]))
    if taken is None:
        return None
    skipped = {path: ways[number][0] for (path, ways), number in zip(options, taken, strict=True)}
    return Choice(*(frozenset(path for path, way in skipped.items() if one in way) for one in ("prefill", "decode")))


def _out_of_reach(
    predicted: PredictedTimes,
    choices: Sequence[Choice],
    speedup: float,
    context: int,
    phases: Sequence[str],
    policy: str,
) -> OptionError:
    largest = {one: max(predicted.speedup(one, choice.of(one)) for choice in choices) for one in phases}
    told = " and ".join(f"{int(ratio * 100) / 100:g} in {one}" for one, ratio in largest.items())
    return OptionError(
        f"speedup={speedup:g} at context={context} is out of reach: by predicted times, policy {policy!r} gets to {told} "
        "at most"
    )
