"""The covering knapsack with two weights: the cheapest choice, one option an item, that weighs enough in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    import highspy  # most plans have no goal

    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    # One thread: the pool of others that it starts would outlive it.
    for name, value in (("threads", 1), ("mip_rel_gap", 0.0), ("mip_abs_gap", 0.0)):
        solver.setOptionValue(name, value)
    taken = [[solver.addBinary(obj=option.cost) for option in item] for item in items]
    for ways in taken:
        solver.addConstr(solver.qsum(ways) == 1)
    for side in (0, 1):
        weights = (option.weights[side] for item in items for option in item)
        ways = (way for ways in taken for way in ways)
        solver.addConstr(solver.qsum(weight * way for weight, way in zip(weights, ways, strict=True)) >= need[side])
    solver.minimize()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    return tuple(max(range(len(ways)), key=[*map(solver.val, ways)].__getitem__) for ways in taken)
