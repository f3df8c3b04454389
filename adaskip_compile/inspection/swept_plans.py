"""What a sweep measured of plans, to be shown beside what the cost model predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import is_finite_number

_SPEEDS = ("request", "prefill", "decode")
_ENDS = ("median", "low", "high")


@dataclass(frozen=True)
class SweptPlan:
    """One row of a sweep: ``loss`` in nats a token, ``speedup`` of each part of a request as median, low and high."""

    name: str
    loss: float
    speedup: Mapping[str, Mapping[str, float]]
    cache_bytes: int
    skipped: frozenset[str]
    prompt_skipped: frozenset[str]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> SweptPlan:
        """Return what a row of ``adaskip sweep --json`` says; ValueError, KeyError or TypeError where it is none."""
        speedup = {what: {end: _number(row["speedup"][what][end]) for end in _ENDS} for what in _SPEEDS}
        paths = (frozenset(map(str, row[key])) for key in ("skipped", "prompt_skipped"))
        return cls(str(row["name"]), _number(row["nll_loss"]), speedup, int(row["cache_bytes"]), *paths)

    def skips_what(self, plan: SkipPlan | None) -> bool:
        """Whether ``plan`` skips these very sublayers in these phases; what stands in for them may be something else."""
        if plan is None:
            return False
        prompt = frozenset(() if plan.prompt is None else plan.prompt.paths)
        return (self.skipped, self.prompt_skipped) == (frozenset(plan.paths), prompt)


def _number(value: Any) -> float:
    if not is_finite_number(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)
