"""Measure how long each sublayer of a model takes on this machine, in prefill and in decode.

Sublayers that cost the same share one measurement, and it is taken by leaving them out: the model runs in
full and with half of a group skipped, in turn in each round, and the difference by the number skipped is the
time of one. So it holds whatever the compiler really makes of a sublayer, on any device. Ratios are taken within a
round, and of several rounds the median counts: other load meets all that runs in a round alike, and a single lucky or
unlucky run changes nothing.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from adaskip_compile.backend import compile
from adaskip_compile.costs.timers import Measured
from adaskip_compile.evaluation.timing import Generation, generate
from adaskip_compile.inspection.inspection import Inspection
from adaskip_compile.planning.skip_plan import SkipPlan

# Decoded after each prompt; the time of a token is the median over them.
NEW_TOKENS = 16

_FULL = -1
# Rounds that differ by less than this share of a phase's time agree.
_SURE = 0.02


def calibrate(
    model: Any,
    found: Inspection,
    *,
    contexts: Sequence[int],
    rounds: int = 3,
    new_tokens: int = NEW_TOKENS,
    inner: str = "inductor",
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """Return the measured times of the sublayers of ``found``, which were found in ``model``.

    ``advance`` is called after each of the ``steps(found, contexts, rounds)`` generations.
    """
    ways = {_FULL: SkipPlan.none(), **_half_skipped(found)}
    tables: dict[str, list[list[float]]] = {phase: [[] for _ in range(len(found.groups) + 1)] for phase in found.phases}
    doubts = ["one round was measured, and noise is what rounds differ by"] if rounds == 1 else []
    for context in contexts:
        ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, context)).to(model.device)
        taken: dict[int, list[Generation]] = {way: [] for way in ways}
        for turn in range(rounds + 1):  # the first turn captures and compiles; not timed
            for way in _rotated(list(ways), turn):
                compile(model, ways[way], inner=inner)
                generation = generate(model, ids, new_tokens)
                if turn:
                    taken[way].append(generation)
                advance()
        for phase in found.phases:
            _add_column(tables[phase], found, ways, taken, phase, context)
            doubts += _doubts(found, taken, phase, context)
    machine = f"{platform.machine()} {model.device.type}, {torch.get_num_threads()} threads"
    groups = tuple(tuple(one.path for one in found.sublayers if one.group == group.index) for group in found.groups)
    measured = {phase: tuple(map(tuple, table)) for phase, table in tables.items()}
    return Measured(tuple(contexts), measured, machine, groups, tuple(doubts))


def steps(found: Inspection, contexts: Sequence[int], rounds: int) -> int:
    """Return how many generations :func:`calibrate` takes."""
    return (1 + len(_half_skipped(found))) * len(contexts) * (rounds + 1)


def _half_skipped(found: Inspection) -> dict[int, SkipPlan]:
    """Return for each group a plan that skips every second of its sublayers; none for a group of one.

    Sublayers whose values others read cannot be skipped alone: their time stays with the rest.
    """
    plans = {}
    for group in found.groups:
        members = [one.path for one in found.sublayers if one.group == group.index and not one.shared_with]
        if len(members) > 1:
            plans[group.index] = SkipPlan.from_scales(dict.fromkeys(members[1::2], 1.0))
    return plans


def _add_column(
    table: list[list[float]],
    found: Inspection,
    ways: dict[int, SkipPlan],
    taken: dict[int, list[Generation]],
    phase: str,
    context: int,
) -> None:
    """Add to ``table`` what one query token takes at ``context``: a row a group, and last the rest."""
    tokens = context if phase == "prefill" else 1
    seconds = {way: [run.seconds(phase) for run in runs] for way, runs in taken.items()}
    full = statistics.median(seconds[_FULL])
    left = {
        way: statistics.median(part / whole for part, whole in zip(times, seconds[_FULL], strict=True))
        for way, times in seconds.items()
    }
    each = [
        full * max(0.0, 1 - left[group.index]) / len(ways[group.index].paths) if group.index in ways else 0.0
        for group in found.groups
    ]
    inside = math.fsum(group.count * seconds for group, seconds in zip(found.groups, each, strict=True))
    # Noise may have the parts add up to more than the whole; the whole was measured, and is kept.
    factor = min(1.0, full / inside) if inside else 1.0
    for row, seconds in zip(table, each, strict=False):
        row.append(seconds * factor / tokens)
    table[-1].append(max(0.0, full - inside * factor) / tokens)


def _doubts(found: Inspection, taken: dict[int, list[Generation]], phase: str, context: int) -> Iterator[str]:
    """Yield what the rounds do not agree on: by how much leaving out half of a group makes a phase faster."""
    whole = [run.seconds(phase) for run in taken[_FULL]]
    for group in found.groups:
        if group.index not in taken:
            continue
        times = (run.seconds(phase) for run in taken[group.index])
        saved = sorted(1 - part / full for part, full in zip(times, whole, strict=True))
        if saved[-1] - saved[0] > max(_SURE, statistics.median(saved)):
            yield (
                f"{group.kind} in {phase} at {context:,} tokens: leaving half of them out saved "
                f"{saved[0]:.0%} to {saved[-1]:.0%} of the time, by round"
            )


def _rotated(ways: list[int], turn: int) -> list[int]:
    """Return the ways beginning with another one each turn, so that none always comes after the same one."""
    start = turn % len(ways)
    return ways[start:] + ways[:start]
