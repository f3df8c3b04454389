"""What to do next: the end of an inspection, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from adaskip_compile.costs.timers import Measured, PhaseTime, Timer, predict
from adaskip_compile.inspection.forecasts import default_contexts, likely_skips
from adaskip_compile.inspection.inspection import Inspection

# Below this a speed-up is lost in the noise of a machine.
_WORTHWHILE = 1.05
_EXAMPLE_SKIPS = 8


def advise(found: Inspection, timer: Timer, context: int) -> list[str]:
    """Return what was not matched and why, where skipping pays, and which option or command comes next."""
    if found.problems and not found.sublayers:
        return list(_unusable(found))
    advice = [*_structure(found), *_profit(found, timer, context), *_next_steps(found)]
    if not isinstance(timer, Measured):
        advice.append(
            "times are those of a roofline of round figures, right to within a factor: add --calibrate to measure "
            "this machine"
        )
    return advice


def _unusable(found: Inspection) -> Iterator[str]:
    yield f"nothing can be skipped: {'; '.join(found.problems)}"
    yield "the model still runs with this backend, in full and correct"
    yield "if its forward breaks into several graphs, TORCH_LOGS=graph_breaks says where; mixtures of experts often do so with experts_implementation='eager'"


def _structure(found: Inspection) -> Iterator[str]:
    yield from found.problems
    held = sum(one.parameters for one in found.unmatched)
    if found.parameters and held:
        names = ", ".join(f"{one.name} ({one.reason})" for one in found.unmatched[:4])
        more = f" and {len(found.unmatched) - 4} more" if len(found.unmatched) > 4 else ""
        yield f"{held / found.parameters:.0%} of the parameters are in no sublayer and always run: {names}{more}"
    for one in found.sublayers:
        if one.shared_with:
            yield f"{one.path} can only be skipped with {', '.join(one.shared_with)}, which read its values"
    if "decode" not in found.phases:
        yield "no decode graph was captured, so decoding is not predicted: the model returned no cache that a second call takes"
    if not any(one.kind == "attention" for one in found.sublayers):
        yield "there is no attention here: skipping saves no KV cache"


def _profit(found: Inspection, timer: Timer, context: int) -> Iterator[str]:
    likely = likely_skips(found, min(_EXAMPLE_SKIPS, len(found.sublayers) // 2))
    planned = bool(found.skipped or found.skipped_at_last or found.body_left)
    if not planned and not likely:
        return
    for phase in found.phases:
        skipped = found.skipped_in(phase) if planned else likely
        body = len(found.body_left) if phase == "prefill" else 0
        if not skipped and not body:
            continue
        what = f"the {len(skipped)} sublayers of the plan" if planned else f"{len(skipped)} sublayers"
        if body:
            what = f"{what} and {body}" if skipped else f"the {body} sublayers of the plan"
            what = f"{what} for the body of a prompt"
        gains = {
            tokens: _gain(found, timer, phase, tokens, skipped) for tokens in default_contexts(context, found.longest)
        }
        if gains[context] >= _WORTHWHILE:
            yield f"skipping {what} makes {phase} {gains[context]:.2f} times as fast at {context:,} tokens"
            continue
        later = next((tokens for tokens, gain in gains.items() if gain >= _WORTHWHILE), None)
        where = f"; it pays from about {later:,} tokens" if later else "; skip more sublayers, or none"
        yield f"skipping {what} hardly speeds {phase} up at {context:,} tokens ({gains[context]:.2f} times){where}"
    yield from _what_maps_cost(found)
    yield from _what_is_lost(found)
    yield from _where_time_goes(found, predict(found, timer, found.phases[-1], context), context)


def _gain(found: Inspection, timer: Timer, phase: str, context: int, skipped: frozenset[str]) -> float:
    saved = found.saved_shares(phase, context)
    return predict(found, timer, phase, context).speedup(found, skipped, saved)


def _where_time_goes(found: Inspection, time: PhaseTime, context: int) -> Iterator[str]:
    by_kind: dict[str, float] = {}
    for one in found.sublayers:
        by_kind[one.kind] = by_kind.get(one.kind, 0.0) + time.groups[one.group] / time.full
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in by_kind.items())
    yield f"time of a {found.phases[-1]} step at {context:,} tokens: {shares}, the rest {time.rest / time.full:.0%}"


def _what_maps_cost(found: Inspection) -> Iterator[str]:
    if found.plan is None or not found.plan.maps:
        return
    replaced = sum(one.parameters for one in found.sublayers if one.path in found.plan.maps)
    numbers = sum(one.numbers for one in found.plan.maps.values())
    yield (
        f"{len(found.plan.maps)} maps stand in for skipped sublayers; they hold {numbers / max(replaced, 1):.0%} as many numbers, "
        "and the predicted speed-ups leave out what they take"
    )


def _what_is_lost(found: Inspection) -> Iterator[str]:
    if found.plan is None or found.plan.prompt is None or found.plan.prompt.measured is None:
        return
    quality = found.plan.prompt.measured.quality
    facts = "" if quality.found is None else f", and of facts {quality.retrieval} found"
    yield f"measured of the plan when it was made: {quality.perplexity} of perplexity{facts}"


def _next_steps(found: Inspection) -> Iterator[str]:
    profiled = any(one.similarity is not None for one in found.sublayers)
    if found.plan is not None:
        if found.watched:
            yield (
                f"{len(found.watched)} FFNs are watched for the first {found.plan.window} tokens of a request, and those "
                f"whose similarity reaches {found.plan.beta:.4f} are skipped too: the steady phase may be faster than predicted"
            )
        yield "next: adaskip run MODEL --plan PLAN, or adaskip_compile.compile(model, plan)"
    elif profiled:
        yield "next: adaskip plan PROFILE --skip 8 --out plan.json, then inspect again with --plan plan.json"
    else:
        yield "next: adaskip profile MODEL --out profile.json measures how similar each sublayer leaves the stream; then inspect with --profile"
