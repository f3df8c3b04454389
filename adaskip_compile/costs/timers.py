"""How long a model's phases will take, and how much faster they are with sublayers skipped.

Two ways to tell the time of a sublayer. :class:`Roofline` takes the larger of its operations at the machine's
peak and its bytes at the memory's bandwidth: rough, but it needs nothing but the cost expressions, and a ratio
of two times depends on the ratio of the two peaks alone. :class:`Measured` interpolates times that were
measured on this machine (:mod:`adaskip_compile.evaluation.calibration`).
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import sympy

from adaskip_compile.costs.model_costs import Costed, Group
from adaskip_compile.files.versioned_json import DocumentFormat
from adaskip_passes.analysis.cost import Cost
from adaskip_passes.errors import OptionError

CALIBRATION_FORMAT = DocumentFormat(
    "adaskip-calibration", 2, remedy="measure this machine with `adaskip inspect MODEL --calibrate --calibration PATH`"
)


class Timer(Protocol):
    """Tells how long one run of a sublayer of a group takes, and of all that is in no sublayer."""

    def seconds(self, group: Group | None, cost: Cost, phase: str, context: int) -> float:
        """Return seconds in ``phase`` at ``context`` tokens; ``group`` is None for the rest of the model."""
        ...


@dataclass(frozen=True)
class Roofline:
    """``max(flops / peak, bytes / bandwidth)``; peak in operations and bandwidth in bytes a second."""

    flops: float
    bandwidth: float

    def seconds(self, group: Group | None, cost: Cost, phase: str, context: int) -> float:
        """Return the longer of computing and moving; weights count with what else is moved."""
        del group
        at = cost_at(cost, phase, context)
        return max(at["flops"] / self.flops, (at["weight_bytes"] + at["activation_bytes"]) / self.bandwidth)


# Round figures of one socket or card, for a model that nothing was measured of. Ratios of times depend on
# their quotient: about 13 operations a byte for a few CPU cores, 100 for an accelerator in half precision.
ROOFLINES = {"cpu": Roofline(2e11, 1.5e10), "cuda": Roofline(2e14, 2e12)}


@dataclass(frozen=True)
class Measured:
    """Times that were measured: ``tables[phase][group]`` holds seconds a query token at each of ``contexts``.

    The last entry of a phase is that of the rest of the model. Between contexts a token's time is taken to be
    linear in the context, which it is where attention reads all tokens before it. ``groups`` are the paths of
    each group's sublayers, and ``doubts`` say what rounds did not agree on; calibrations of earlier versions have none.
    """

    contexts: tuple[int, ...]
    tables: Mapping[str, tuple[tuple[float, ...], ...]] = field(hash=False)
    machine: str = ""
    groups: tuple[tuple[str, ...], ...] = ()
    doubts: tuple[str, ...] = ()

    def seconds(self, group: Group | None, cost: Cost, phase: str, context: int) -> float:
        """Return the interpolated seconds; never less than zero."""
        del cost
        return self.seconds_of(-1 if group is None else group.index, phase, context)

    def seconds_of(self, index: int, phase: str, context: int) -> float:
        """Return the same for the group of that ``index``; -1 is the rest of the model."""
        values = self.tables[phase][index]
        tokens = context if phase == "prefill" else 1
        return max(0.0, tokens * interpolate(self.contexts, values, context))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the times to ``path``, whole or not at all; :class:`FileError` where that fails."""
        CALIBRATION_FORMAT.write(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Measured:
        """Return the times in the file at ``path``; :class:`FileError` where it cannot be used."""
        payload = CALIBRATION_FORMAT.read(path)
        try:
            tables = {phase: tuple(map(tuple, table)) for phase, table in payload["tables"].items()}
            groups = tuple(map(tuple, payload.get("groups", ())))  # version 1 had none
            contexts = tuple(payload["contexts"])
            _check_tables(contexts, tables)
            doubts = tuple(map(str, payload.get("doubts", ())))
            return cls(contexts, tables, str(payload["machine"]), groups, doubts)
        except (KeyError, TypeError, AttributeError) as error:
            raise CALIBRATION_FORMAT.damaged(path, f"it lacks {error}") from error
        except ValueError as error:
            raise CALIBRATION_FORMAT.damaged(path, error) from error

    def check(self, model: str, phases: Collection[str], groups: int) -> None:
        """Raise :class:`OptionError` unless these times are of a model with so many ``groups`` in each of ``phases``."""
        for phase in phases:
            if len(self.tables.get(phase, ())) != groups + 1:
                raise OptionError(
                    f"the calibration was measured on another model: it has {len(self.tables.get(phase, ())) - 1} groups of "
                    f"sublayers in {phase}, and {model} has {groups}; measure again with --calibrate"
                )


def _check_tables(contexts: tuple[Any, ...], tables: Mapping[str, tuple[tuple[Any, ...], ...]]) -> None:
    """Raise ValueError unless there is a finite number of seconds for each of ascending contexts."""
    if not contexts or any(type(one) is not int or one < 1 for one in contexts) or [*contexts] != sorted({*contexts}):
        raise ValueError(f"its contexts are numbers of tokens, ascending, and not {contexts!r}")
    for phase, table in tables.items():
        for row in table:
            if len(row) != len(contexts) or not all(
                isinstance(one, (int, float)) and math.isfinite(one) for one in row
            ):
                raise ValueError(f"its table of {phase} takes a finite number of seconds for each context")


def interpolate(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Return the value at ``x`` of the broken line through ``xs`` (ascending) and ``ys``.

    Before its first point it stays as it is there. After its last point it goes on straight, but never falls: a
    token takes no less time for more context, whatever the noise of two measurements says.

    >>> interpolate((1, 3), (10.0, 30.0), 2), interpolate((1, 3), (10.0, 30.0), 4), interpolate((1, 3), (10.0, 30.0), 0)
    (20.0, 40.0, 10.0)
    >>> interpolate((1, 3), (30.0, 10.0), 4), interpolate((5,), (7.0,), 1)
    (10.0, 7.0)
    """
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    right = min(bisect_right(xs, x), len(xs) - 1)
    (x0, x1), (y0, y1) = xs[right - 1 : right + 1], ys[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x < x1 or y1 > y0 else y1


def cost_at(cost: Cost, phase: str, context: int) -> dict[str, float]:
    """Return the parts of ``cost`` by name, for one sequence at ``context`` tokens: a prefill of them, or one more token."""
    at = cost.at(q=context if phase == "prefill" else 1, t=context)
    return {name: _number(part) for name, part in zip(PARTS, at.parts(), strict=True)}


PARTS = ("flops", "weight_bytes", "activation_bytes", "cache_bytes")


def _number(part: sympy.Expr) -> float:
    value = float(part)
    if not math.isfinite(value):
        raise OptionError(f"the cost {part} is no number at this context length")
    return value


@dataclass(frozen=True)
class PhaseTime:
    """What one phase takes at one context length: seconds of each group's sublayer, of the rest, and of the whole."""

    groups: tuple[float, ...]
    rest: float
    full: float

    def without(
        self, found: Costed, skipped: Collection[str], saved: Mapping[str, float] = MappingProxyType({})
    ) -> float:
        """Return the seconds with the sublayers at the paths ``skipped`` left out: what stands for them is free.

        Of those in ``saved`` a share is left out.
        """
        shares = {**saved, **dict.fromkeys(skipped, 1.0)}
        return self.full - math.fsum(self.groups[one.group] * shares.get(one.path, 0.0) for one in found.sublayers)

    def speedup(
        self, found: Costed, skipped: Collection[str], saved: Mapping[str, float] = MappingProxyType({})
    ) -> float:
        """Return how many times faster the phase is with ``skipped`` left out, and a share of those in ``saved``."""
        return self.full / self.without(found, skipped, saved)


def predict(found: Costed, timer: Timer, phase: str, context: int) -> PhaseTime:
    """Return what ``phase`` takes at ``context`` tokens in full, part by part."""
    groups = tuple(timer.seconds(group, group.cost[phase], phase, context) for group in found.groups)
    rest = timer.seconds(None, found.rest[phase], phase, context)
    return PhaseTime(groups, rest, rest + math.fsum(groups[one.group] for one in found.sublayers))
