"""The ways that the demo compares, and what it finds out about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaskip_compile.evaluation.timing import Generation
    from adaskip_compile.planning.quality import Quality

EAGER, FULL, PAPER = "eager, full", "adaskip, full", "adaskip, the paper's choice"


def within(max_loss: float) -> str:
    """Return the name of the way whose plan keeps a budget of ``max_loss`` nats a token."""
    return f"adaskip, within {100 * max_loss:g} %"


@dataclass(frozen=True)
class Comparison:
    """What the demo found, by way.

    ``plans`` has no entry for the eager way. ``qualities`` has none for those that run in full: they lose nothing.
    ``extra`` has the scale of each FFN, by path, that the paper's choice added after the window.
    """

    plans: dict[str, Any]
    generations: dict[str, list[Generation]]
    qualities: dict[str, Quality]
    extra: dict[str, float]
    prompt_tokens: int
