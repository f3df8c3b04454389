"""The covering knapsack with two weights: the cheapest choice, one option an item, that weighs enough in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Weights are rounded down to a grid of about so many steps.
_STEPS = 512


@dataclass(frozen=True)
class Option:
    """One way to take an item: what it costs, and its two weights, each a share of 1."""

    cost: float
    weights: tuple[float, float]


def cover(items: Sequence[Sequence[Option]], need: tuple[float, float]) -> tuple[int, ...] | None:
    """Return the number of the option taken of each item, so that both sums of weights reach ``need`` at least cost.

    Weights are rounded down, so the choice always does reach it; it is the cheapest as the rounded weights are.
    Both grids depend on the weights alone, so that a greater ``need`` never costs less. None where all of them
    together, rounded, fall short. An item that can be left out has an option of no cost and no weight.

    >>> cheap, dear = Option(1.0, (0.25, 0.25)), Option(3.0, (0.75, 0.5))
    >>> nothing = Option(0.0, (0.0, 0.0))
    >>> cover([(nothing, cheap), (nothing, dear)], (0.5, 0.5))
    (0, 1)
    """
    grids = [_steps([option.weights[side] for item in items for option in item]) for side in (0, 1)]
    sizes = [math.ceil(need[side] * grids[side] - _SLACK) for side in (0, 1)]
    wholes = [
        [tuple(math.floor(option.weights[side] * grids[side] + _SLACK) for side in (0, 1)) for option in item]
        for item in items
    ]
    # least[i, j]: the least cost at which the items from here on weigh i and j.
    least = torch.full((sizes[0] + 1, sizes[1] + 1), math.inf, dtype=torch.float64)
    least[0, 0] = 0.0
    rows, columns = (torch.arange(size + 1) for size in sizes)
    taken: list[torch.Tensor] = []
    for item, weights in zip(reversed(items), reversed(wholes), strict=True):
        ways = [
            option.cost + least[(rows - one).clamp(min=0)][:, (columns - other).clamp(min=0)]
            for option, (one, other) in zip(item, weights, strict=True)
        ]
        least, choice = torch.stack(ways).min(0)
        taken.append(choice.to(torch.uint8))
    if not math.isfinite(float(least[-1, -1])):
        return None
    row, column = sizes
    chosen: list[int] = []
    for choice, weights in zip(reversed(taken), wholes, strict=True):
        chosen.append(int(choice[row, column]))
        one, other = weights[chosen[-1]]
        row, column = max(0, row - one), max(0, column - other)
    return tuple(chosen)


# What floating point may lose of a weight that is a whole number of steps.
_SLACK = 1e-9


def _steps(weights: Sequence[float]) -> int:
    """Return how many steps make 1, so that rounding the weights down loses the least in all."""

    def loss(steps: int) -> float:
        return sum(weight - math.floor(weight * steps + _SLACK) / steps for weight in weights)

    return min(range(_STEPS, 2 * _STEPS), key=loss)
