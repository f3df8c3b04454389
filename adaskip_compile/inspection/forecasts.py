"""What to forecast times for, where nobody has said: which sublayers, and at which context lengths."""

from __future__ import annotations

from typing import Any

from adaskip_compile.inspection.inspection import Inspection


def likely_skips(found: Inspection, count: int) -> frozenset[str]:
    """Return ``count`` sublayers to predict with where there is no plan.

    The most similar ones where a profile is given; otherwise attentions, which are the most similar as a
    rule, spread evenly, and never all of them.
    """
    if any(one.similarity is not None for one in found.sublayers):
        ranked = sorted(found.sublayers, key=lambda one: -(one.similarity or 0.0))
        return frozenset(one.path for one in ranked[:count])
    attentions = [one.path for one in found.sublayers if one.kind == "attention"] or [
        one.path for one in found.sublayers
    ]
    count = min(count, len(attentions) - 1)
    return (
        frozenset(attentions[index * len(attentions) // count] for index in range(count)) if count > 0 else frozenset()
    )


def default_contexts(context: int, longest: int | None = None) -> tuple[int, ...]:
    """Return the context lengths to predict at: powers of two from 256 to ``longest`` (or 128 k), and ``context``.

    >>> default_contexts(3000, 4096)
    (256, 512, 1024, 2048, 3000, 4096)
    """
    most = longest or 2**17
    return tuple(sorted({context, *(2**power for power in range(8, 21) if 2**power <= most)}))


def as_plain(value: Any) -> Any:
    """Return ``value`` rounded to what a person or a page reads of it: six figures."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
