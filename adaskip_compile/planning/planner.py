"""Planning: choose offline, from a profile, what a plan skips (AdaSkip section 3.2)."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence

from adaskip_compile.costs.timers import Timer
from adaskip_compile.planning.compensated_plans import compensated
from adaskip_compile.planning.plan_options import PlanOptions
from adaskip_compile.planning.policies import LAYER_POLICIES, choose, keeps_enough, largest_skip, layer_choices
from adaskip_compile.planning.replacement_costs import replacement_costs
from adaskip_compile.planning.skip_plan import RampStep, SkipPlan
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.planning.speedup_goal import Choice, in_phase, reach_speedup, within_loss
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.errors import OptionError


def plan(
    profile: Profile,
    *,
    skip: int = 8,
    speedup: float | None = None,
    policy: str = "adaskip",
    context: int | None = None,
    window: int = 20,
    scale: str = "token",
    seed: int = 0,
    phase: str = "both",
    max_loss: float | None = None,
    times: Timer | str | os.PathLike[str] | None = None,
    compensation: str = "scale",
) -> SkipPlan:
    """Choose offline what to skip.

    By default it is the paper's choice: the ``skip`` sublayers, of all kinds in one ranking, that are most
    similar; the threshold beta for the online choice is the smallest similarity among them. With ``context``, a
    set is chosen that by predicted times makes both prefill and decode ``speedup`` times as fast, at the least
    damage; prefill and decode may then skip different sublayers, and none is added online.

    Args:
        profile: What was measured of the model.
        skip: How many sublayers to skip.
        speedup: In place of ``skip``. Without ``context``, the paper's target acceleration alpha: skips 2m sublayers,
            where m = M - M/alpha of M layers, a layer being two sublayers. With it, the ratio of times to reach.
        policy: How to choose: one of :data:`adaskip_compile.planning.policy_names.POLICIES`; :mod:`adaskip_compile.planning.policies` cites each.
        context: The context length, in tokens, at which ``speedup`` is to be reached in prefill and in decode.
        window: How many decoded tokens to measure before FFNs are added; 0 adds none. Of policies that add none,
            ``skip_decode`` takes as long to reach its full ramp, and the others have no use for it.
        scale: Which ratio makes up for a sublayer: ``token`` (paper Eq. 3) or ``frobenius`` (the authors' code).
        seed: What ``random`` draws with.
        phase: Where to skip: in ``both`` phases, in ``prefill`` only (FFNs run again in decode; attentions cannot,
            for want of a cache), or in ``decode`` only.
        max_loss: In place of ``skip``: the loss, in nats a token above the full model's, that the joint order of the
            profile predicts at most.
        times: What tells times for ``context``: a calibration of this machine or the file of one, or any other
            :class:`~adaskip_compile.costs.timers.Timer`; by default a roofline of round figures.
        compensation: What stands in the place of a skipped sublayer: its ``scale`` (paper Eq. 4), ``none``, or one of
            the maps that :func:`adaskip_compile.fit` gave the profile: ``channel``, ``low_rank`` or ``affine``.

    Raises:
        OptionError: An option has a value that it cannot take, or that is more than this model allows. For a speed-up
            out of reach, the message says what can be reached.
        FileError: ``times`` names a file that cannot be used.
    """
    options = PlanOptions(
        skip=skip,
        speedup=speedup,
        policy=policy,
        context=context,
        window=window,
        scale=scale,
        seed=seed,
        phase=phase,
        max_loss=max_loss,
        times=times,
        compensation=compensation,
    )
    return plan_by_options(profile, options)


def plan_by_options(profile: Profile, options: PlanOptions) -> SkipPlan:
    """Return the plan that ``options`` ask for of ``profile``; :func:`plan` tells what they mean, and what is raised."""
    policy, phase, scale, compensation = options.policy, options.phase, options.scale, options.compensation
    if options.max_loss is not None:
        chosen = within_loss(profile, options.max_loss, compensation)
        made = _fixed(profile, in_phase(profile, chosen, phase), "loss_greedy", scale)
    elif options.context is not None:
        assert options.speedup is not None
        goal = reach_speedup(
            profile,
            options.speedup,
            options.context,
            policy=policy,
            times=options.times,
            phase=phase,
            seed=options.seed,
            replacements=replacement_costs(profile, compensation),
        )
        made = _fixed(profile, goal, policy, scale)
    else:
        made = _of_count(profile, _choose(profile, policy, options.skip, options.speedup, options.seed), options)
    return compensated(made, profile, compensation)


def _of_count(profile: Profile, chosen: tuple[str, ...], options: PlanOptions) -> SkipPlan:
    """Return the plan that skips ``chosen`` in the phase asked for, and what the policy adds while a request is decoded."""
    policy, phase, window, scale = options.policy, options.phase, options.window, options.scale
    if policy == "skip_decode" and phase == "decode":
        return _skip_decode_ramp(profile, chosen, window, scale)
    made = _fixed(profile, in_phase(profile, chosen, phase), policy, scale)
    if policy != "adaskip" or phase == "prefill":
        return made
    beta = min((found.mean_similarity for found in profile.sublayers if found.path in chosen), default=None)
    return SkipPlan(made.skipped, beta, window, policy, scale, profile.model, made.ramp)


def _choose(profile: Profile, policy: str, skip: int, speedup: float | None, seed: int) -> tuple[str, ...]:
    """Return ``skip`` sublayers, or as many as the target acceleration ``speedup`` stands for."""
    total = len(profile.sublayers)
    if speedup is not None and policy in LAYER_POLICIES:
        sets = layer_choices(profile, policy)
        layers = len(sets) - 1
        chosen = sets[round(layers - layers / speedup)]
        if (chosen and keeps_enough(profile, chosen)) or speedup == 1:
            return chosen
        raise _too_many(profile, policy, f"speedup={speedup}", seed)
    # 2m = 2(M - M/alpha), with M = total / 2 layers
    count = skip if speedup is None else round(total - total / speedup)
    if count <= largest_skip(profile, policy, seed):
        chosen = choose(profile, policy, count, seed)
        if keeps_enough(profile, chosen):
            return chosen
        raise OptionError(f"policy {policy!r} would skip every attention with skip={count}, and one must stay")
    asked = f"skip={skip}" if speedup is None else f"speedup={speedup} skips {count} sublayers, which"
    raise _too_many(profile, policy, asked, seed, by_speedup=speedup is not None)


def _too_many(profile: Profile, policy: str, asked: str, seed: int, *, by_speedup: bool = False) -> OptionError:
    total, limit = len(profile.sublayers), largest_skip(profile, policy, seed)
    who = "" if policy == "adaskip" else f" for policy {policy!r}"
    why = f"at most {limit} of this model's {total} sublayers can be skipped"
    if policy == "adaskip" and limit < total - 1:
        why += f", because its most similar {limit + 1} hold every attention and one must stay"
    remedy = f"; the largest speedup is {_floor(total / (total - limit))}" if by_speedup else ""
    return OptionError(f"{asked} is too many{who}: {why}{remedy}")


def _floor(ratio: float) -> float:
    """Return ``ratio`` with two digits, rounded down, so that it is still allowed."""
    return math.floor(ratio * 100) / 100


def _fixed(profile: Profile, choice: Choice, policy: str, scale: str) -> SkipPlan:
    """Return the plan that skips what ``choice`` says in each phase, and adds nothing online."""
    ramp: tuple[RampStep, ...] = ()
    if choice.prefill != choice.decode:
        resumed = tuple(found.path for found in profile.sublayers if found.path in choice.prefill - choice.decode)
        ramp = (RampStep(0, _skipped(profile, choice.decode - choice.prefill, scale), resumed),)
    return SkipPlan(_skipped(profile, choice.prefill, scale), None, 0, policy, scale, profile.model, ramp)


def _skip_decode_ramp(profile: Profile, chosen: Sequence[str], window: int, scale: str) -> SkipPlan:
    """Return the plan that skips ever more of ``chosen``, given from the first layer on, over ``window`` decoded tokens."""
    layers = [layer for layer in layer_choices(profile, "skip_decode")[1:] if {*layer} <= {*chosen}]
    begins: dict[int, list[str]] = {}
    known: set[str] = set()
    for index, layer in enumerate(layers):
        begins.setdefault(round(index * window / len(layers)), []).extend(path for path in layer if path not in known)
        known.update(layer)
    ramp = tuple(RampStep(after, _skipped(profile, paths, scale)) for after, paths in begins.items())
    return SkipPlan((), None, 0, "skip_decode", scale, profile.model, ramp)


def _skipped(profile: Profile, paths: Collection[str], scale: str) -> tuple[SkippedSublayer, ...]:
    return tuple(
        SkippedSublayer(found.path, found.kind, found.stateful, found.mean_scale(scale), found.mean_similarity)
        for found in profile.sublayers
        if found.path in paths
    )
