"""Compensation: what makes up for a skipped sublayer beyond the paper's scale, fitted by least squares.

A sublayer's branch ``y = b - a`` is imitated by a map of the stream before it
(:mod:`adaskip_passes.specialise.stream_maps`). The maps are fitted from sums over tokens, which are taken in one pass over any
samples, hold ``O(d^2)`` numbers a sublayer whatever the number of tokens, and merge exactly:

* ``affine`` is the ridge regression of y on ``rms_norm(a)``, with the ridge that does best on held-out samples;
* ``low_rank`` is its best approximation of rank r in the error of y (reduced-rank regression, Izenman 1975);
* ``channel`` fits b channel by channel, each token weighted by one over the mean square of a, so that a token whose
  stream is huge counts no more than another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from adaskip_compile.profiling.stream_maps import StreamMap, normalised
from adaskip_passes.errors import ProfileError
from adaskip_passes.specialise.stream_maps import EPSILON

# Relative to the mean square of a feature.
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass
class BranchStatistics:
    """Sums over tokens of one sublayer, in float64: all that any map is fitted from.

    ``inputs`` is ``X'X`` and ``products`` ``X'Y``, where a row of X is ``(rms_norm(a), 1)`` and one of Y is ``b - a``;
    ``outputs`` is the sum of squares of Y. ``channels`` ``(6, d)`` are the sums of 1, a, b, a a, a b and b b, each token
    weighted by one over the mean square of a.
    """

    inputs: torch.Tensor
    products: torch.Tensor
    outputs: torch.Tensor
    channels: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> BranchStatistics:
        """Return the sums over no tokens."""
        shapes = ((width + 1, width + 1), (width + 1, width), (), (6, width))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Count the tokens of the stream ``a`` before and ``b`` after the sublayer, both ``(..., d)``."""
        a, b = (value.detach().reshape(-1, value.shape[-1]).float() for value in (a, b))
        x = torch.cat([normalised(a), torch.ones_like(a[:, :1])], -1)
        y = b - a
        # Products of one sample in float32, sums over samples in float64.
        self.inputs += x.mT @ x
        self.products += x.mT @ y
        self.outputs += y.double().square().sum()
        weight = 1 / (a.square().mean(-1, keepdim=True) + EPSILON)
        columns = (weight.expand_as(a), weight * a, weight * b, weight * a * a, weight * a * b, weight * b * b)
        self.channels += torch.stack([column.double().sum(0) for column in columns])

    def merge(self, other: BranchStatistics) -> BranchStatistics:
        """Return the sums over the tokens of both."""
        return BranchStatistics(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.inputs[-1, -1])


def fit_map(form: str, fitted: BranchStatistics, held_out: BranchStatistics, *, rank: int = 0) -> StreamMap:
    """Return the map of ``form`` that fits the tokens of ``fitted``.

    ``held_out`` decides on the ridge and gives the map's error; without tokens the fitted ones do. Then the map is
    fitted once more, to all tokens. ``rank`` is that of ``low_rank``.

    Raises:
        ProfileError: There are no tokens, or the stream holds NaN or an infinity.
    """
    if not fitted.tokens:
        raise ProfileError("nothing to fit a compensation to: no tokens were measured")
    everything = fitted.merge(held_out) if held_out.tokens else fitted
    judged = held_out if held_out.tokens else fitted
    if not all(getattr(everything, field.name).isfinite().all() for field in fields(everything)):
        raise ProfileError("the residual stream overflows: no compensation can be fitted to NaN or an infinity")
    if form == "channel":
        return _stream_map(form, _fit_channels(everything), _missed_by_channels(_fit_channels(fitted), judged))
    errors = {ridge: _missed(_regression(fitted, ridge), judged) for ridge in _RIDGES}
    ridge = min(errors, key=errors.__getitem__)
    whole = _regression(everything, ridge)
    if form == "affine":
        return _stream_map(form, {"weight": whole[:-1].mT, "shift": whole[-1]}, errors[ridge])
    tried = _factors(_regression(fitted, ridge), fitted, rank)
    return _stream_map(form, _factors(whole, everything, rank), _missed(_product(tried), judged))


def _stream_map(form: str, tensors: Mapping[str, torch.Tensor], error: float) -> StreamMap:
    held = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    return StreamMap(form, held, error)


def _regression(found: BranchStatistics, ridge: float) -> torch.Tensor:
    """Return the coefficients ``(d + 1, d)``, the constant last; it is not shrunk."""
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


def _missed(coefficients: torch.Tensor, judged: BranchStatistics) -> float:
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
