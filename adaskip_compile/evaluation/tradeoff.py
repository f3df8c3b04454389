"""Quality against speed: the rows of a sweep's table, its plot, and which plan to recommend."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaskip_compile.evaluation.candidates import FULL, Candidate
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.evaluation.suite import kind_of
from adaskip_compile.evaluation.sweep_results import SweepResults
from adaskip_compile.evaluation.timing import Spread
from adaskip_passes.errors import PlanError


@dataclass(frozen=True)
class Row:
    """What a sweep found of one candidate.

    ``loss`` is the NLL above the full model's, nats a token, the mean over the domains, each counting the same: of all tokens of
    a window, or, where a plan skips for the body of a prompt alone, of those after a prompt. ``measures`` are the scores by
    measure. Speed-ups are against the full model in the same round: of the time to the first token (``prefill``), of a token after the window (``decode``), and of the whole request (``request``).
    """

    candidate: Candidate
    loss: float
    measures: dict[str, Scores]
    prefill: Spread
    decode: Spread
    request: Spread
    cache_bytes: int


def make_rows(candidates: Sequence[Candidate], results: SweepResults) -> list[Row]:
    """Return a row for each candidate, in their order, with the measures that all of them have."""
    found = [results.quality[candidate.name] for candidate in candidates]
    common = [name for name in found[0] if all(name in each for each in found)]
    measures = {
        candidate.name: {name: Scores(tuple(each[name])) for name in common}
        for candidate, each in zip(candidates, found, strict=True)
    }
    kind = loss_measure(candidates)
    full = _mean_nll(measures[FULL], kind)
    return [
        Row(
            candidate,
            _mean_nll(measures[candidate.name], kind) - full,
            measures[candidate.name],
            Spread.of(results.speedups(candidate.name, "first")),
            Spread.of(results.speedups(candidate.name, "step")),
            Spread.of(results.speedups(candidate.name, "first", "later")),
            results.cache_bytes[candidate.name],
        )
        for candidate in candidates
    ]


def loss_measure(candidates: Sequence[Candidate]) -> str:
    """Return the measure that a loss is told by: where one skips for the body of a prompt, nobody reads what follows its tokens."""
    return "decode" if any(one.depths is not None for one in candidates) else "nll"


def as_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV: a line a candidate; a mean and a standard error for each measure."""
    names = list(rows[0].measures)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    speeds = [f"{what}_speedup{end}" for what in ("prefill", "decode", "request") for end in ("", "_low", "_high")]
    scores = [f"{name}{end}" for name in names for end in ("", "_error")]
    writer.writerow(["plan", "policy", "compensation", "skipped", "nll_loss", *speeds, "cache_bytes", *scores])
    for row in rows:
        one = row.candidate
        spreads = [number for each in (row.prefill, row.decode, row.request) for number in _numbers(each)]
        values = [number for name in names for number in (row.measures[name].mean, row.measures[name].error)]
        numbers = [f"{number:.6g}" for number in (row.loss, *spreads)]
        writer.writerow(
            [one.name, one.policy or FULL, one.compensation, one.skip, *numbers, row.cache_bytes]
            + [f"{value:.6g}" for value in values]
        )
    return text.getvalue()


def draw_curve(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the loss over the speed-up of the whole request, a line for each policy and compensation."""
    lines: dict[str, list[Row]] = {}
    for row in rows[1:]:
        lines.setdefault(f"{row.candidate.policy}, {row.candidate.compensation}", []).append(row)
    for label, found in lines.items():
        curve = [rows[0], *found]
        speeds = [row.request.median for row in curve]
        spread = [
            [row.request.median - row.request.low for row in curve],
            [row.request.high - row.request.median for row in curve],
        ]
        axes.errorbar(speeds, [row.loss for row in curve], xerr=spread, fmt="o-", capsize=2, label=label)
        for row in found:
            axes.annotate(
                row.candidate.name.split("/")[1],
                (row.request.median, row.loss),
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.legend()


def recommend(rows: Sequence[Row], *, max_loss: float | None = None, speedup: float | None = None) -> Row:
    """Return the fastest plan that loses at most ``max_loss`` NLL, or the one that loses least and is fast enough.

    Fast is the median speed-up of the whole request.

    Raises:
        PlanError: No plan is good or fast enough; the message says what the best one reaches.
    """
    plans = [row for row in rows if row.candidate.policy]
    if not plans:
        raise PlanError("there is no plan to recommend: give --skips above 0, or --depths")
    if max_loss is not None:
        good = [row for row in plans if row.loss <= max_loss]
        if not good:
            best = min(plans, key=lambda row: row.loss)
            raise PlanError(
                f"no plan loses at most {max_loss:g} nats a token: {best.candidate.name} loses least, {best.loss:.3f}. "
                "Try smaller --skips or --depths, or allow more with --max-loss"
            )
        return max(good, key=lambda row: row.request.median)
    fast = [row for row in plans if speedup is None or row.request.median >= speedup]
    if not fast:
        best = max(plans, key=lambda row: row.request.median)
        raise PlanError(
            f"no plan is {speedup:g} times as fast: {best.candidate.name} is fastest, {best.request.median:.2f}x. "
            "Try greater --skips or --depths, or ask for less with --speedup"
        )
    return min(fast, key=lambda row: row.loss)


def as_good(rows: Sequence[Row], best: Row, *, max_loss: float | None = None) -> list[Row]:
    """Return the plans that cannot be told from ``best`` by what was measured.

    With ``max_loss``, those that keep it too and whose fastest round is faster than the slowest one of ``best``; without,
    those that are as fast and lose no more than the standard error of a loss allows.
    """
    others = [row for row in rows if row.candidate.policy and row is not best]
    if max_loss is not None:
        return [row for row in others if row.loss <= max_loss and row.request.high >= best.request.low]
    kind = loss_measure([row.candidate for row in rows])
    return [
        row
        for row in others
        if row.request.median >= best.request.low and row.loss - best.loss <= _loss_error(row.measures, kind)
    ]


def _loss_error(measures: dict[str, Scores], kind: str) -> float:
    found = [scores.error for name, scores in measures.items() if kind_of(name) == kind]
    return math.hypot(*found) / len(found)


def _mean_nll(measures: dict[str, Scores], kind: str) -> float:
    found = [scores.mean for name, scores in measures.items() if kind_of(name) == kind]
    return sum(found) / len(found)


def _numbers(spread: Spread) -> tuple[float, float, float]:
    return spread.median, spread.low, spread.high
