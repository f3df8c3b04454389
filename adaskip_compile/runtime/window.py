"""The online choice: what a request skips too, decided from its first decoded tokens (AdaSkip section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_passes.errors import LegalityError


def extra_sublayers(
    plan: SkipPlan, window_stats: Mapping[str, tuple[float, float]], *, stateful: Collection[str] = ()
) -> dict[str, float]:
    """Choose online what to skip from now on too, once the window of a request is over.

    Every FFN that was kept so far and whose similarity reaches beta is added, with the scale that was measured in
    this window (as in the authors' code; the paper uses the offline scale again).

    Args:
        plan: The plan of the request.
        window_stats: By path of each stateless sublayer kept so far, the means over the tokens of the window of its
            similarity and its scale, of the plan's ``scale_kind``.
        stateful: Paths that must not be added, because their cache would have a hole.

    Returns:
        The scale of each added sublayer by path, in the order of ``window_stats``.

    Raises:
        LegalityError: A stateful sublayer was measured as if it could be added.
    """
    for path in stateful:
        if path in window_stats:
            raise LegalityError(
                f"{path} is stateful: skipped after prefill, its cache would have a hole. Measure FFNs only"
            )
    beta = plan.beta
    if beta is None:
        return {}
    return {
        path: scale
        for path, (similarity, scale) in window_stats.items()
        # A sublayer that overflowed has no finite scale; it is kept.
        if path not in plan.scales and similarity >= beta and math.isfinite(scale)
    }
