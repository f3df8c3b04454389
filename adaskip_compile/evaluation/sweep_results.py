"""What a sweep has found so far, kept in a file so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaskip_compile.evaluation.candidates import FULL
from adaskip_compile.files.versioned_json import DocumentFormat, digest
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import is_finite_number
from adaskip_passes.errors import ForeignFileError

SWEEP_FORMAT = DocumentFormat("adaskip-sweep", 1, remedy="run `adaskip sweep MODEL --results` with another file")

# One timed request: the seconds to the first token, of all later ones together, and of each one after the window.
TIMES = ("first", "later", "step")


class SweepResults:
    """The results of one sweep.

    ``about`` says of what: the model, texts, sizes and machine. ``quality`` has the values of the items by candidate
    and measure; ``rounds`` the times (:data:`TIMES`, seconds) by candidate, a dict for each round in which they took
    turns; ``cache_bytes`` what the KV cache of each held; ``plans`` a digest of the plan that was measured of each.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self.path, self.about = Path(path), dict(about)
        self.quality: dict[str, dict[str, list[float]]] = {}
        self.rounds: list[dict[str, list[float]]] = []
        self.cache_bytes: dict[str, int] = {}
        self.plans: dict[str, str] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], about: Mapping[str, Any]) -> SweepResults:
        """Return the results in the file at ``path``, or empty ones where there is no such file.

        Raises:
            FileError: The file cannot be read, or is no file of results.
            ForeignFileError: It is of another model, of other texts or of other arguments; the message says which.
        """
        results = cls(path, about)
        if not results.path.exists():
            return results
        payload = SWEEP_FORMAT.read(path)
        results._check(payload.get("about"))
        try:
            results.quality = {name: _numbers(found) for name, found in payload["quality"].items()}
            results.rounds = [_numbers(found, count=len(TIMES)) for found in payload["rounds"]]
            results.cache_bytes = {name: int(count) for name, count in payload["cache_bytes"].items()}
            results.plans = dict(payload.get("plans", {}))  # earlier versions recorded none
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SWEEP_FORMAT.damaged(path, "it lacks what a sweep records") from error
        return results

    def save(self) -> None:
        """Write the file, whole or not at all."""
        names = ("about", "quality", "rounds", "cache_bytes", "plans")
        SWEEP_FORMAT.write(self.path, {name: getattr(self, name) for name in names})

    def measure_by(self, plans: Mapping[str, SkipPlan]) -> None:
        """Say what plan each candidate is measured by from here on; what was measured by another one is forgotten."""
        for name, plan in plans.items():
            digested = digest(json.dumps(plan.to_dict(), sort_keys=True))
            if self.plans.get(name, digested if _has_scales(plan) else None) != digested:
                self._forget(name)
            self.plans[name] = digested

    def _forget(self, candidate: str) -> None:
        self.quality.pop(candidate, None)
        self.cache_bytes.pop(candidate, None)
        for found in self.rounds:
            found.pop(candidate, None)

    def add_quality(self, candidate: str, measure: str, values: tuple[float, ...]) -> None:
        """Record the values of one measure under one plan."""
        self.quality.setdefault(candidate, {})[measure] = list(values)
        self.save()

    def add_round(self, times: Mapping[str, tuple[float, float, float]]) -> None:
        """Record a round in which candidates took turns: the :data:`TIMES` of each."""
        self.rounds.append({name: list(found) for name, found in times.items()})
        self.save()

    def timed(self, candidate: str) -> int:
        """Return in how many rounds a candidate was timed beside the full model."""
        return sum(candidate in found and FULL in found for found in self.rounds)

    def speedups(self, candidate: str, *what: str) -> list[float]:
        """Return the ratio of the full model's time to this one's, of :data:`TIMES` summed, a value for each round of both."""
        columns = [TIMES.index(column) for column in what]
        pairs = [(found[FULL], found[candidate]) for found in self.rounds if candidate in found and FULL in found]
        return [sum(full[at] for at in columns) / sum(ours[at] for at in columns) for full, ours in pairs]

    def _check(self, theirs: Any) -> None:
        if not isinstance(theirs, dict):
            raise SWEEP_FORMAT.damaged(self.path, "it does not say what it is about")
        for name in dict.fromkeys([*self.about, *theirs]):
            if theirs.get(name) != self.about.get(name):
                raise ForeignFileError(
                    f"{self.path} is of another sweep: its {name} is {theirs.get(name)!r}, and here it is "
                    f"{self.about.get(name)!r}. Name another file with --results, or delete this one"
                )


def _numbers(found: Mapping[str, Any], *, count: int = 0) -> dict[str, list[float]]:
    """Return lists of numbers by name, of ``count`` numbers above 0 each where that is given; ValueError for others."""
    for values in found.values():
        if not values or not all(map(is_finite_number, values)):
            raise ValueError("takes finite numbers")
        if count and (len(values) != count or min(values) <= 0):
            raise ValueError(f"takes {count} times")
    return {name: list(values) for name, values in found.items()}


def _has_scales(plan: SkipPlan) -> bool:
    """Tell whether ``plan`` is what versions that recorded no plan measured, whatever compensation the name told of."""
    return not plan.maps and (not plan.all_paths or set(plan.all_scales.values()) != {1.0})
