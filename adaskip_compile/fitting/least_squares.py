"""Compensation: what makes up for a skipped sublayer beyond the paper's scale, fitted by least squares.

A sublayer's branch ``y = b - a`` is imitated by a map of the stream before it
(:mod:`adaskip_passes.specialise.stream_maps`). The maps are fitted from sums over tokens, which are taken in one pass over any
samples, hold ``O(d^2)`` numbers a sublayer whatever the number of tokens, and merge exactly:

* ``affine`` is the ridge regression of y on ``rms_norm(a)``, with the ridge that does best on held-out samples;
* ``low_rank`` is its best approximation of rank r in the error of y (reduced-rank regression, Izenman 1975);
* ``gated`` imitates a gated FFN by some of its own units, whose weights in the sum are fitted anew
  (:mod:`adaskip_compile.fitting.gated_maps`);
* ``channel`` fits b channel by channel, each token weighted by one over the mean square of a, so that a token whose
  stream is huge counts no more than another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

from adaskip_compile.profiling.stream_maps import StreamMap, normalised
from adaskip_passes.errors import ProfileError
from adaskip_passes.specialise.stream_maps import EPSILON

# Forms that are fitted from statistics of the stream alone.
FITTED_FORMS = ("channel", "low_rank", "affine")
# Relative to the mean square of a feature.
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

MomentsOf = TypeVar("MomentsOf", bound="Moments")


@dataclass
class Moments:
    """Sums over tokens, in float64, that a regression of Y on X is solved from.

    ``inputs`` is ``X'X`` and ``products`` ``X'Y``, where the last column of X is 1; ``outputs`` is the sum of squares of Y.
    """

    inputs: torch.Tensor
    products: torch.Tensor
    outputs: torch.Tensor

    @classmethod
    def of_features(cls, features: int, width: int, device: torch.device) -> Moments:
        """Return the sums over no tokens, for so many features beside the constant."""
        shapes = ((features + 1, features + 1), (features + 1, width), ())
        return Moments(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def count(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count tokens of the features x ``(tokens, features)``, to which the constant is added, and y ``(tokens, d)``."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
        # Products of one sample in float32, sums over samples in float64.
        self.inputs += x.mT @ x
        self.products += x.mT @ y
        self.outputs += y.double().square().sum()

    def merge(self: MomentsOf, other: MomentsOf) -> MomentsOf:  # noqa: PYI019 - Self is of 3.11
        """Return the sums over the tokens of both."""
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.inputs[-1, -1])


@dataclass
class BranchStatistics(Moments):
    """Sums over tokens of one sublayer: all that any map is fitted from, but a ``gated`` one.

    A row of X is ``(rms_norm(a), 1)`` and one of Y ``b - a``. ``channels`` ``(6, d)`` are the sums of 1, a, b, a a, a b and
    b b, each token weighted by one over the mean square of a.
    """

    channels: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> BranchStatistics:
        """Return the sums over no tokens."""
        none = Moments.of_features(width, width, device)
        channels = torch.zeros((6, width), dtype=torch.float64, device=device)
        return cls(none.inputs, none.products, none.outputs, channels)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Count the tokens of the stream ``a`` before and ``b`` after the sublayer, both ``(..., d)``."""
        a, b = as_tokens(a), as_tokens(b)
        self.count(normalised(a), b - a)
        weight = 1 / (a.square().mean(-1, keepdim=True) + EPSILON)
        columns = (weight.expand_as(a), weight * a, weight * b, weight * a * a, weight * a * b, weight * b * b)
        self.channels += torch.stack([column.double().sum(0) for column in columns])


def as_tokens(value: torch.Tensor) -> torch.Tensor:
    """Return a value of the stream, ``(..., d)``, as ``f32[tokens, d]``."""
    return value.detach().reshape(-1, value.shape[-1]).float()


def fit_map(form: str, fitted: BranchStatistics, held_out: BranchStatistics, *, rank: int = 0) -> StreamMap:
    """Return the map of ``form`` that fits the tokens of ``fitted``.

    ``held_out`` decides on the ridge and gives the map's error; without tokens the fitted ones do. Then the map is
    fitted once more, to all tokens. ``rank`` is that of ``low_rank``.

    Raises:
        ProfileError: There are no tokens, or the stream holds NaN or an infinity.
    """
    everything, judged = _everything(fitted, held_out)
    if form == "channel":
        return _stream_map(form, _fit_channels(everything), _missed_by_channels(_fit_channels(fitted), judged))
    ridge, error = _best_ridge(fitted, judged)
    whole = _regression(everything, ridge)
    if form == "affine":
        return _stream_map(form, {"weight": whole[:-1].mT, "shift": whole[-1]}, error)
    tried = _factors(_regression(fitted, ridge), fitted, rank)
    return _stream_map(form, _factors(whole, everything, rank), _missed(_product(tried), judged))


def fit_gated(gate: torch.Tensor, value: torch.Tensor, fitted: Moments, held_out: Moments) -> StreamMap:
    """Return the ``gated`` map of the units ``gate`` and ``value``, ``(units, d)``, whose ``out`` fits the branch.

    ``fitted`` and ``held_out``, as :func:`fit_map` takes them, are of what the units give.

    Raises:
        ProfileError: There are no tokens, or the stream holds NaN or an infinity.
    """
    everything, judged = _everything(fitted, held_out)
    ridge, error = _best_ridge(fitted, judged)
    whole = _regression(everything, ridge)
    return _stream_map("gated", {"gate": gate, "value": value, "out": whole[:-1].mT, "shift": whole[-1]}, error)


def _everything(fitted: MomentsOf, held_out: MomentsOf) -> tuple[MomentsOf, MomentsOf]:
    """Return all tokens, and those that judge."""
    if not fitted.tokens:
        raise ProfileError("nothing to fit a compensation to: no tokens were measured")
    everything = fitted.merge(held_out) if held_out.tokens else fitted
    if not all(getattr(everything, field.name).isfinite().all() for field in fields(everything)):
        raise ProfileError("the residual stream overflows: no compensation can be fitted to NaN or an infinity")
    return everything, held_out if held_out.tokens else fitted


def _best_ridge(fitted: Moments, judged: Moments) -> tuple[float, float]:
    """Return the ridge that does best on ``judged``, and what it misses there."""
    errors = {ridge: _missed(_regression(fitted, ridge), judged) for ridge in _RIDGES}
    ridge = min(errors, key=errors.__getitem__)
    return ridge, errors[ridge]


def _stream_map(form: str, tensors: Mapping[str, torch.Tensor], error: float) -> StreamMap:
    held = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    return StreamMap(form, held, error)


def _regression(found: Moments, ridge: float) -> torch.Tensor:
    """Return the coefficients ``(features + 1, d)``, the constant last; it is not shrunk."""
    penalty = torch.full_like(found.inputs[0], ridge * found.inputs.diagonal()[:-1].mean().item())
    penalty[-1] = 0
    return torch.linalg.solve(found.inputs + penalty.diag(), found.products)


def _directions(coefficients: torch.Tensor, found: BranchStatistics, rank: int) -> torch.Tensor:
    """Return the ``rank`` directions ``(d, rank)`` in which what ``coefficients`` predict varies most about its mean."""
    centred = found.inputs - torch.outer(found.inputs[-1], found.inputs[-1]) / found.inputs[-1, -1]
    return torch.linalg.eigh(coefficients.mT @ centred @ coefficients).eigenvectors[:, -rank:]


def _product(factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([factors["down"].mT @ factors["up"].mT, factors["shift"][None]])


def _factors(coefficients: torch.Tensor, found: BranchStatistics, rank: int) -> dict[str, torch.Tensor]:
    directions = _directions(coefficients, found, rank)
    slope = coefficients[:-1] @ directions
    means = found.inputs[-1, :-1] / found.inputs[-1, -1]
    shift = found.products[-1] / found.inputs[-1, -1] - means @ slope @ directions.mT
    return {"down": slope.mT, "up": directions, "shift": shift}


def _missed(coefficients: torch.Tensor, judged: Moments) -> float:
    """Return the part of the sum of squares of Y that ``coefficients`` leave."""
    left = (
        judged.outputs
        - 2 * (coefficients * judged.products).sum()
        + (coefficients * (judged.inputs @ coefficients)).sum()
    )
    return float(left / judged.outputs)


def _fit_channels(found: BranchStatistics) -> dict[str, torch.Tensor]:
    weight, a, b, aa, ab, _ = found.channels
    spread = (aa - a * a / weight).clamp_min(1e-12 * aa.mean())
    gain = (ab - a * b / weight) / spread
    return {"gain": gain, "shift": (b - gain * a) / weight}


def _missed_by_channels(fit: Mapping[str, torch.Tensor], judged: BranchStatistics) -> float:
    """Return the sum of ``(b - gain a - shift)^2`` over that of ``(b - a)^2``, both weighted."""
    weight, a, b, aa, ab, bb = judged.channels
    gain, shift = fit["gain"], fit["shift"]
    left = bb + gain**2 * aa + shift**2 * weight + 2 * (gain * shift * a - gain * ab - shift * b)
    return float(left.sum() / (bb - 2 * ab + aa).sum())
