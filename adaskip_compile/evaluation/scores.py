"""What a measure found: one value an item."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """The values of a measure's items (windows, questions, prompts), in their order.

    >>> Scores((1.0, 0.0, 1.0, 1.0)).mean
    0.75
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the items."""
        return math.fsum(self.values) / len(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean: the items' standard deviation by the root of their number; 0 for one item."""
        if len(self.values) < 2:
            return 0.0
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    def __str__(self) -> str:
        spread = f" ± {self.error:.3f}" if len(self.values) > 1 else ""  # one item tells of none
        return f"{self.mean:.3f}{spread}"
