"""An inspection as plain data: what ``--json`` prints and what the page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaskip_compile.costs.model_costs import Group
from adaskip_compile.costs.timers import PARTS, Measured, PhaseTime, Roofline, Timer, cost_at, predict
from adaskip_compile.inspection.advice import advise
from adaskip_compile.inspection.forecasts import as_plain, default_contexts, likely_skips
from adaskip_compile.inspection.inspection import InspectedSublayer, Inspection
from adaskip_compile.inspection.swept_plans import SweptPlan
from adaskip_compile.planning.skip_plan import PLAN_FORMAT
from adaskip_passes.analysis.cost import Cost
from adaskip_passes.errors import OptionError
from adaskip_passes.ir.expressions import to_tree

_EXAMPLE_COUNTS = (4, 8, 16)


def inspection_report(
    found: Inspection,
    timer: Timer,
    context: int,
    *,
    runtime: Mapping[str, Any] | None = None,
    sweep: Sequence[SweptPlan] = (),
) -> dict[str, Any]:
    """Return everything about ``found`` at ``context`` tokens as dicts, lists, strings and numbers; times are seconds.

    ``runtime`` is what :meth:`adaskip_compile.Report.to_dict` gave, if there is one to show too, and ``sweep`` what a sweep
    over this model measured.

    Raises:
        OptionError: The sweep is over another model.
    """
    strange = {path for one in sweep for path in one.skipped | one.prompt_skipped} - {
        one.path for one in found.sublayers
    }
    if strange:
        raise OptionError(f"the sweep is over another model: {found.model} has no sublayer {min(strange)}")
    times = {phase: predict(found, timer, phase, context) for phase in found.phases}
    return {
        "model": found.model,
        "class": found.kind,
        "dtype": found.dtype,
        "parameters": found.parameters,
        "context": context,
        "longest": found.longest,
        "skip_sets": {name: sorted(paths) for name, paths in skip_sets(found).items()},
        "timer": _timer(timer),
        "sublayers": [_sublayer(found, one, times, context) for one in found.sublayers],
        "groups": [_group(group) for group in found.groups],
        "rest": _costs(found.rest),
        "predictions": predictions(found, timer, context),
        "plan": None if found.plan is None else _plan(found),
        "steps": [asdict(step) for step in found.steps],
        "unmatched": [asdict(one) for one in found.unmatched],
        "problems": list(found.problems),
        "advice": advise(found, timer, context),
        "runtime": runtime,
        "sweep": [_swept(one, found) for one in sweep],
    }


def skip_sets(found: Inspection) -> dict[str, frozenset[str]]:
    """Return the skip sets to predict with, by name: the plan's, or examples of 4, 8 and 16 where there is none."""
    if found.plan is not None:
        later = found.skipped_at_last
        return {"plan": found.skipped} | ({"plan in decode": later} if later != found.skipped else {})
    counts = [count for count in _EXAMPLE_COUNTS if count < len(found.sublayers)] or [len(found.sublayers) // 2]
    return {f"skip {len(chosen)}": chosen for count in counts if (chosen := likely_skips(found, count))}


def predictions(found: Inspection, timer: Timer, context: int) -> list[dict[str, Any]]:
    """Return one row a context length: seconds in full and the speed-up of each skip set, by phase."""
    sets = skip_sets(found)
    rows = []
    for tokens in default_contexts(context, found.longest):
        row: dict[str, Any] = {"context": tokens}
        for phase in found.phases:
            time, saved = predict(found, timer, phase, tokens), found.saved_shares(phase, tokens)
            speedups = {
                name: as_plain(time.speedup(found, chosen, saved if name == "plan" else {}))
                for name, chosen in sets.items()
            }
            row[phase] = {"seconds": as_plain(time.full), "speedup": speedups}
        rows.append(row)
    return rows


def phase_states(found: Inspection, one: InspectedSublayer) -> dict[str, str] | None:
    """Return whether a sublayer is kept or skipped in each phase of a request; None without a plan.

    ``body`` is skipped for the body of a prompt alone, keys and values kept, or has a window there.
    """
    if one.skipped is None:
        return None
    assert found.plan is not None
    watched = one.path in found.watched
    begins = "skipped" if one.path in found.plan.paths_at(0) else "kept"
    ends = "skipped" if one.path in found.skipped_at_last else "kept"
    prompt = "body" if one.path in found.body_left else "kept"
    return {
        "prefill": "skipped" if one.skipped else prompt,
        "window": "probed" if watched else begins,
        "steady": "open" if watched and ends == "kept" else ends,
    }


def _sublayer(
    found: Inspection, one: InspectedSublayer, times: Mapping[str, PhaseTime], context: int
) -> dict[str, Any]:
    group = found.groups[one.group]
    cost = {phase: cost_at(group.cost[phase], phase, context) for phase in found.phases}
    share = {phase: as_plain(time.groups[one.group] / time.full) for phase, time in times.items()}
    return {
        "path": one.path,
        "kind": one.kind,
        "stateful": one.stateful,
        "group": one.group,
        "parameters": one.parameters,
        "shared_with": list(one.shared_with),
        "similarity": one.similarity,
        "scale": one.scale,
        "skipped": one.skipped,
        "phases": phase_states(found, one),
        "cost": cost,
        "share": share,
        "body_left": None if one.path not in found.body_left else _costs({"prefill": found.body_left[one.path]}),
    }


def _swept(one: SweptPlan, found: Inspection) -> dict[str, Any]:
    return {
        "name": one.name,
        "loss": one.loss,
        "speedup": one.speedup,
        "cache_bytes": one.cache_bytes,
        "is_plan": one.skips_what(found.plan),
    }


def _group(group: Group) -> dict[str, Any]:
    return {"kind": group.kind, "count": group.count, "cost": _costs(group.cost)}


def _costs(costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Return the cost of each phase and part, as text for people and as a tree for programs."""
    return {
        phase: {
            name: {"text": str(part), "tree": to_tree(part)} for name, part in zip(PARTS, cost.parts(), strict=True)
        }
        for phase, cost in costs.items()
    }


def _timer(timer: Timer) -> dict[str, Any]:
    if isinstance(timer, Measured):
        return {"kind": "measured", **asdict(timer)}
    assert isinstance(timer, Roofline)
    return {"kind": "roofline", **asdict(timer)}


def _plan(found: Inspection) -> dict[str, Any]:
    assert found.plan is not None
    prompt = found.plan.prompt
    return {
        "format": PLAN_FORMAT.name,
        **found.plan.to_dict(),
        "model": None,
        "watched": sorted(found.watched),
        "prompt_from": None if prompt is None or not prompt.named_paths else prompt.least_rows,
    }
