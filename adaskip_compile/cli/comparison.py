"""The ways that the demo compares, and what it finds out about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaskip_compile.cli.measure import Generation

EAGER, FULL, SKIPPING = "eager, full", "adaskip, full", "adaskip, skipping"


@dataclass(frozen=True)
class Comparison:
    """What the demo found.

    ``generations`` and ``nll`` (nats a token) are by way; ``extra`` has the scale of each FFN, by path,
    that skipping added after the window.
    """

    plan: Any
    generations: dict[str, list[Generation]]
    nll: dict[str, float]
    extra: dict[str, float]
    prompt_tokens: int
