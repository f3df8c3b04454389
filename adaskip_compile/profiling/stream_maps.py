"""Maps of the stream: what may stand in the place of a skipped sublayer instead of its scale.

:mod:`adaskip_compile.fitting.least_squares` fits them, and :mod:`adaskip_passes.specialise.stream_maps` puts them into graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from adaskip_passes.errors import ProfileError
from adaskip_passes.specialise.stream_maps import EPSILON, FORMS, part_shapes


@dataclass(frozen=True, eq=False)
class StreamMap:
    """A map that stands in the place of a sublayer.

    Args:
        form: ``channel``, ``low_rank``, ``affine`` or ``gated``.
        tensors: Its tensors by the names in ``stream_maps.FORMS``, ``f32`` on the CPU.
        error: What part of the branch's energy it misses on held-out tokens, or on the fitted ones where none
            were held out: 0 is perfect, and 1 no better than leaving the branch out. None for a map that was tuned
            together with others: it imitates no single branch any more.

    Raises:
        ProfileError: The tensors are not those of such a map.
    """

    form: str
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    error: float | None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ProfileError(f"a map's form is one of {', '.join(FORMS)}, not {self.form!r}")
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if "shift" not in shapes or shapes != part_shapes(self.form, shapes["shift"][-1], self.rank):
            raise ProfileError(f"a map of form {self.form} does not have tensors of the shapes {shapes}")
        if not all(tensor.isfinite().all() for tensor in self.tensors.values()):
            raise ProfileError(f"a map of form {self.form} holds NaN or an infinity")

    @property
    def rank(self) -> int:
        """The rank of a ``low_rank`` map, or the units of a ``gated`` one; 0 of others."""
        first = self.tensors.get("down", self.tensors.get("gate"))
        return 0 if first is None else int(first.shape[0])

    @property
    def numbers(self) -> int:
        """How many numbers it holds: what a decoded token reads, and half of its operations."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def __str__(self) -> str:
        size = f"{self.rank} units" if self.form == "gated" else f"rank {self.rank}"
        form = f"{self.form} of {size}" if self.rank else self.form
        return f"{form}, tuned" if self.error is None else f"{form}, misses {self.error:.0%}"

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        """Return b for the stream ``a``, ``(..., d)``."""
        parts = {name: tensor.to(a) for name, tensor in self.tensors.items()}
        if self.form == "channel":
            return parts["gain"] * a + parts["shift"]
        x = normalised(a)
        if self.form == "gated":
            x = units_of(x, parts["gate"], parts["value"])
        elif self.form == "low_rank":
            x = x @ parts["down"].mT
        return a + x @ parts[FORMS[self.form][-2]].mT + parts["shift"]

    def __eq__(self, other: object) -> bool:
        """Tell whether both are the same map."""
        if not isinstance(other, StreamMap) or self.form != other.form:
            return NotImplemented if not isinstance(other, StreamMap) else False
        return all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())

    def __hash__(self) -> int:
        return hash((self.form, self.error))


def units_of(x: torch.Tensor, gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return what the units of a ``gated`` map, ``(units, d)`` each, give of ``x``, ``(..., d)``: ``(..., units)``."""
    return functional.silu(x @ gate.mT) * (x @ value.mT)


def normalised(a: torch.Tensor) -> torch.Tensor:
    """Return ``a`` over the root of the mean square of its last dimension: what maps read."""
    return a * torch.rsqrt(a.square().mean(-1, keepdim=True) + EPSILON)
