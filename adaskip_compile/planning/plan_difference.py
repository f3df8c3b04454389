"""What differs between two plans: sublayer by sublayer, and in what they go by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.stream_maps import StreamMap

RUNS = "runs"


@dataclass(frozen=True)
class Difference:
    """What two plans say of one thing, a sublayer's path or the name of a setting."""

    what: str
    one: str
    other: str


def differences(one: SkipPlan, other: SkipPlan) -> list[Difference]:
    """Return what differs between two plans: settings first, then sublayers in the order in which the plans name them."""
    settings = zip(_settings(one), _settings(other), strict=True)
    found = [Difference(name, before, after) for (name, before), (_, after) in settings if before != after]
    for path in dict.fromkeys((*one.named_paths, *other.named_paths)):
        before, after = (_said_of(plan, path) for plan in (one, other))
        if before != after:
            found.append(Difference(path, before, after))
        elif not _same_maps(one, other, path):
            found.append(Difference(path, before, f"{after}, fitted otherwise"))
    if not found and one.to_dict() != other.to_dict():
        found.append(Difference("what was measured", "as it was", "otherwise, or by less than is shown"))
    return found


def _settings(plan: SkipPlan) -> Iterator[tuple[str, str]]:
    """Yield each setting and what it is; the same names for every plan."""
    prompt = plan.prompt
    measured = None if prompt is None else prompt.measured
    yield "model", "any" if plan.model is None else f"{plan.model.name} {plan.model.key}"
    yield "policy", plan.policy
    yield "window", f"{plan.window} tokens"
    yield "beta", "-" if plan.beta is None else f"{plan.beta:.6f}"
    yield "scale", plan.scale_kind
    yield "rows in full", "-" if prompt is None else f"first {prompt.head}, last {prompt.tail}"
    yield "perplexity", "-" if measured is None else measured.quality.perplexity
    yield "facts found", "-" if measured is None else measured.quality.retrieval
    yield "a prompt multiplies less", "-" if measured is None else f"{measured.speedup:.2f}x"


def _said_of(plan: SkipPlan, path: str) -> str:
    """Return when ``plan`` skips a sublayer, and what stands for it."""
    said = []
    if plan.prompt is not None:
        said += [
            f"prompt, {_instead(one, plan.prompt.maps.get(path))}" for one in plan.prompt.skipped if one.path == path
        ]
        said += [f"prompt, sees {plan.prompt.windows[path]} tokens"] if path in plan.prompt.windows else []
    said += [f"throughout, {_instead(one, plan.maps.get(path))}" for one in plan.skipped if one.path == path]
    for step in plan.ramp:
        begun = f"from decoded token {step.after} on"
        said += [f"{begun}, {_instead(one, plan.maps.get(path))}" for one in step.skipped if one.path == path]
        said += [f"{begun} runs again"] if path in step.resumed else []
    return "; ".join(said) or RUNS


def _instead(skipped: SkippedSublayer, found: StreamMap | None) -> str:
    return f"scale {skipped.scale:.4f}" if found is None else str(found)


def _same_maps(one: SkipPlan, other: SkipPlan, path: str) -> bool:
    for before, after in zip(_maps(one, path), _maps(other, path), strict=True):
        if before is None or after is None:
            continue  # what is said of them tells
        if any(not torch.equal(value, after.tensors[name]) for name, value in before.tensors.items()):
            return False
    return True


def _maps(plan: SkipPlan, path: str) -> tuple[StreamMap | None, StreamMap | None]:
    return plan.maps.get(path), None if plan.prompt is None else plan.prompt.maps.get(path)
