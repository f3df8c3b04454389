"""The covering knapsack with two weights: the cheapest choice, one option an item, that weighs enough in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What the dearest option is scaled to.
_COSTS = 1e3
# What scipy calls a problem that nothing solves.
_INFEASIBLE = 2


@dataclass(frozen=True)
class Option:
    """One way to take an item: what it costs, and its two weights, each a share of 1."""

    cost: float
    weights: tuple[float, float]


def cover(items: Sequence[Sequence[Option]], need: tuple[float, float]) -> tuple[int, ...] | None:
    """Return the number of the option taken of each item, so that both sums of weights reach ``need`` at least cost.

    None where no choice does. It is exact but for the tolerance of the solver, HiGHS: sums may fall short by 1e-7. An
    item that can be left out has an option of no cost and no weight.

    >>> cheap, dear = Option(1.0, (0.25, 0.25)), Option(3.0, (0.75, 0.5))
    >>> nothing = Option(0.0, (0.0, 0.0))
    >>> cover([(nothing, cheap), (nothing, dear)], (0.5, 0.5))
    (0, 1)
    """
    from scipy.optimize import LinearConstraint, milp  # most plans have no goal

    if not items:
        return None if max(need) > 0 else ()
    options = [(number, option) for number, item in enumerate(items) for option in item]
    one_each = [[float(owner == number) for owner, _ in options] for number in range(len(items))]
    weights = [[option.weights[side] for _, option in options] for side in (0, 1)]
    # Scaled, so that the absolute gap at which the solver stops is far below any difference of costs.
    dearest = max(option.cost for _, option in options)
    found = milp(
        [option.cost * _COSTS / dearest if dearest else 0.0 for _, option in options],
        integrality=[1] * len(options),
        bounds=(0, 1),
        constraints=(LinearConstraint(one_each, 1, 1), LinearConstraint(weights, need)),
        options={"mip_rel_gap": 0.0},
    )
    if found.status == _INFEASIBLE:
        return None
    if found.x is None:
        raise RuntimeError(f"the solver of plans for a goal gave up: {found.message}")
    values = iter(found.x)
    shares = [[next(values) for _ in item] for item in items]
    return tuple(max(range(len(ways)), key=ways.__getitem__) for ways in shares)
