"""One sublayer that is skipped, and the scale that stands for it."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip_compile.profiling.profiles import is_finite_number
from adaskip_passes.errors import PlanError


@dataclass(frozen=True)
class SkippedSublayer:
    """One sublayer that a plan skips, from the first token of a request on.

    Args:
        path: The module path, such as ``model.layers.3.self_attn``.
        kind: ``attention``, ``ssm`` or ``ffn``; empty where the plan was not made from a profile.
        stateful: Whether it reads or writes the cache; None where the plan was not made from a profile.
        scale: What the residual stream is multiplied by in its place (paper Eq. 4).
        similarity: Its mean similarity in the profile, or None.

    Raises:
        PlanError: A field has a value that makes no sense.
    """

    path: str
    kind: str
    stateful: bool | None
    scale: float
    similarity: float | None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path or not isinstance(self.kind, str):
            raise PlanError(f"a skipped sublayer's path and kind are text, not {self.path!r} and {self.kind!r}")
        if self.stateful not in (None, True, False):
            raise PlanError(f"sublayer {self.path}: stateful is True, False or None, not {self.stateful!r}")
        if not is_finite_number(self.scale) or self.scale <= 0:
            raise PlanError(f"sublayer {self.path}: scale is {self.scale!r}; it takes a finite number above 0")
        if self.similarity is not None and not is_finite_number(self.similarity):
            raise PlanError(
                f"sublayer {self.path}: similarity is {self.similarity!r}; it takes a finite number or None"
            )
