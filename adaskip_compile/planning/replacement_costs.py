"""What stands for a skipped sublayer, and what it costs beyond the scale that stands for it always.

A plan must never skip a sublayer for something dearer. ``none`` and ``scale`` cost nothing here: a multiplication
of the stream is in every measured time of a model that skips.
"""

from __future__ import annotations

import math

import sympy

from adaskip_compile.costs.model_costs import Group
from adaskip_compile.costs.timers import ROOFLINES, Roofline, Timer
from adaskip_compile.planning.policy_names import COMPENSATIONS
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.analysis.cost import B, Cost, Q
from adaskip_passes.errors import OptionError
from adaskip_passes.specialise.stream_maps import part_shapes


def replacement_cost(kind: str, width: int, *, rank: int = 0, element_bytes: int = 4) -> Cost:
    """Return what ``kind`` costs in place of one sublayer of a stream ``width`` wide.

    ``channel`` is a factor and a bias a channel, ``low_rank`` two matrices ``(width, rank)``, ``affine`` one
    ``(width, width)``, each with a bias.

    >>> print(replacement_cost("low_rank", 576, rank=64))
    147456*b*q flops, 297216 weight bytes, 5120*b*q activation bytes, 0 cache bytes
    """
    if kind not in COMPENSATIONS:
        raise OptionError(f"compensation={kind!r}: takes one of {', '.join(COMPENSATIONS)}")
    if kind in ("none", "scale"):
        return Cost()
    shapes = part_shapes(kind, width, rank).values()
    products = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    numbers = sum(map(math.prod, shapes))
    moved = 2 * width + (2 * rank if kind == "low_rank" else 0)
    return Cost(
        flops=2 * products * B * Q,
        weight_bytes=sympy.Integer(numbers * element_bytes),
        activation_bytes=moved * element_bytes * B * Q,
    )


def replacement_costs(profile: Profile, compensation: str) -> dict[str, Cost] | None:
    """Return what ``compensation`` costs in place of each sublayer that the profile has such a map of; None for no map."""
    if compensation in ("none", "scale"):
        return None
    held = ((path, one) for path, ones in profile.maps.items() for one in ones if one.form == compensation)
    return {path: replacement_cost(one.form, one.tensors["shift"].numel(), rank=one.rank) for path, one in held}


def replacement_seconds(
    cost: Cost, timer: Timer, replaced: Group, phase: str, context: int, *, device: str = "cpu"
) -> float:
    """Return how long what costs ``cost`` takes in place of a sublayer of the group ``replaced``.

    Measured times know nothing of it: there it takes the share of the sublayer's time that it takes by a roofline.
    """
    if isinstance(timer, Roofline):
        return timer.seconds(replaced, cost, phase, context)
    roofline = ROOFLINES.get(device, ROOFLINES["cpu"])
    share = roofline.seconds(replaced, cost, phase, context) / roofline.seconds(
        replaced, replaced.cost[phase], phase, context
    )
    return share * timer.seconds(replaced, replaced.cost[phase], phase, context)
