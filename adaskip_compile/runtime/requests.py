"""Requests: what one of them skips, and how far it has come; :mod:`adaskip_compile.kv_cache` tells whose a call is."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from adaskip_compile.planning.skip_plan import RampStep, SkipPlan
from adaskip_compile.runtime.variants import Variant
from adaskip_compile.runtime.window import extra_sublayers
from adaskip_passes.errors import LegalityError

# What a call of a request is: its prompt, one of its first decoded tokens, measured, or a later one.
RequestPhase = Literal["prefill", "window", "steady"]


@dataclass(frozen=True, eq=False)
class Choice:
    """What a call runs, and the tensors that it takes for what is skipped."""

    variant: Variant
    replacements: tuple[torch.Tensor, ...]


@dataclass(eq=False)
class Request:
    """One request: its plan, what it skips now, and how far it has come.

    ``holes`` are the stateful sublayers that have no state in its cache; none of them may run again.
    ``scales`` maps each path that the plan skips by now to its scale, ``extra`` those that the window added.
    ``ramp`` are the steps of the plan's ramp that are still to come. ``captures`` says which graphs had to be
    captured for it, and why. ``length`` is the number of tokens that its cache held after its last call, as far as it
    grows; ``storages`` are the cache's memory by address, and ``mark`` is what the cache carries. ``body_tokens`` are those
    of a row for which the plan's prompt skips applied. ``chosen`` is what its calls run, by graph and phase: forgotten
    whenever what it skips or measures changes. ``began`` is when it did, in seconds on the process's clock.
    """

    number: int
    plan: SkipPlan
    scales: dict[str, float]
    holes: frozenset[str]
    learning: bool = False
    extra: dict[str, float] = field(default_factory=dict)
    window_left: int = 0
    window_rows: list[torch.Tensor] = field(default_factory=list)
    window_paths: tuple[str, ...] = ()
    tokens: dict[RequestPhase, int] = field(default_factory=lambda: {"prefill": 0, "window": 0, "steady": 0})
    seconds: dict[RequestPhase, float] = field(default_factory=lambda: {"prefill": 0.0, "window": 0.0, "steady": 0.0})
    batch: int = 1
    kv_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    captures: list[str] = field(default_factory=list)
    storages: dict[int, StorageWeakRef] = field(default_factory=dict)
    mark: weakref.ref[Any] | None = None
    length: int = 0
    chosen: dict[Any, Choice] = field(default_factory=dict)
    ramp: tuple[RampStep, ...] = ()
    body_tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def skipped(self) -> dict[str, float]:
        """Every path skipped now, and its scale."""
        return {**self.scales, **self.extra}

    @property
    def ended(self) -> bool:
        """Whether nothing carries its mark any more and all memory of its cache is gone; or its cache has moved."""
        carried = self.mark is not None and self.mark() is not None
        return not carried and all(storage.expired() for storage in self.storages.values())

    @property
    def placeless(self) -> bool:
        """Whether it skips the same at every place: its plan has neither a ramp nor a window."""
        return not self.plan.ramp and not window_of(self.plan)

    def copied(self) -> Request:
        """Return a copy at the same place, with a cache of its own."""
        return replace(
            self,
            scales=dict(self.scales),
            extra=dict(self.extra),
            window_rows=list(self.window_rows),
            tokens=dict(self.tokens),
            seconds=dict(self.seconds),
            notes=[*self.notes, f"copied from request {self.number}"],
            captures=[],
            chosen={},
            storages={},
            mark=None,
            began=time.monotonic(),
        )

    def goes_on_like(self, other: Request) -> bool:
        """Tell whether both would go on in the same way: under equal plans, at places that make no difference."""
        if self is other:
            return True
        mine, its = self.plan, other.plan
        if (mine.beta, mine.window, mine.scale_kind, mine.prompt) != (its.beta, its.window, its.scale_kind, its.prompt):
            return False
        if self.window_rows or other.window_rows or mine.maps.keys() != its.maps.keys():
            return False
        return (
            all(mine.maps[path] is its.maps[path] for path in mine.maps)
            and (self.skipped, self.holes, self.ramp) == (other.skipped, other.holes, other.ramp)
            and (self.window_left, self.learning) == (other.window_left, other.learning)
            and (not self.ramp or self.decoded == other.decoded)
        )

    def check(self, skipped: frozenset[str], *, because: str = "") -> None:
        """Raise :class:`LegalityError` if running all but ``skipped`` would run a stateful sublayer that has a hole."""
        back = sorted(self.holes - skipped)
        if back:
            raise LegalityError(
                f"request {self.number}: {', '.join(back)} was skipped earlier in this request and has no cache entries "
                "for those tokens, so it cannot run again; keep it skipped, or start a new request with a new cache"
                + (f" ({because})" if because else "")
            )

    @property
    def decoded(self) -> int:
        """How many tokens a row went through decode so far."""
        return self.tokens["window"] + self.tokens["steady"]

    def take_ramp_steps(self, stateful: frozenset[str]) -> None:
        """Skip and resume from the next decoded token on what the ramp says; ``stateful`` are all such sublayers.

        A stateful sublayer that is dropped is a hole from then on: :meth:`check` refuses to run it again.
        """
        if not self.ramp or self.ramp[0].after > self.decoded:
            return
        self.ramp = tuple(step for step in self.ramp if step.after > self.decoded)
        self.scales = self.plan.scales_at(self.decoded)
        # The plan decides on those from now on, not the window.
        self.extra = {path: scale for path, scale in self.extra.items() if path not in self.scales}
        self.holes |= stateful.intersection(self.scales)
        self.chosen.clear()

    def record_window(self, rows: torch.Tensor, paths: tuple[str, ...]) -> None:
        """Take the statistics of one decoded token, ``f32[len(paths), 3]``; after the last one, choose the extra FFNs."""
        if paths != self.window_paths and self.window_rows:
            # The ramp took a sublayer away, or gave one back: what was measured in all of the window counts.
            common = tuple(path for path in paths if path in self.window_paths)
            self.window_rows = [_rows_of(kept, self.window_paths, common) for kept in self.window_rows]
            rows, paths = _rows_of(rows, paths, common), common
        self.window_paths = paths
        self.window_rows.append(rows)
        self.window_left -= 1
        if self.window_left == 0:
            self.close_window()

    def close_window(self) -> None:
        """Choose the extra sublayers from what the window measured (one read-back for the whole window)."""
        means = torch.stack(self.window_rows).double().mean(0).tolist()
        self.window_rows.clear()
        column = 1 if self.plan.scale_kind == "token" else 2
        measured = {path: (row[0], row[column]) for path, row in zip(self.window_paths, means, strict=True)}
        self.extra = extra_sublayers(self.plan, measured, stateful=self.holes)
        self.chosen.clear()


def _rows_of(rows: torch.Tensor, paths: tuple[str, ...], wanted: tuple[str, ...]) -> torch.Tensor:
    """Return the rows of ``wanted`` among those of ``paths``."""
    return rows[[paths.index(path) for path in wanted]]


def window_of(plan: SkipPlan) -> int:
    """Return for how many tokens to probe; without a threshold there is nothing to choose."""
    return plan.window if plan.beta is not None else 0
