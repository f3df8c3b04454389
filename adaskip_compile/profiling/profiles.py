"""Profiles: what offline learning measured of every sublayer (AdaSkip section 3.2).

A profile keeps one value a sample and not a running mean, so that merging loses nothing: the profile of two halves of
the samples, merged, is the profile of all of them, to the last bit and in any order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from adaskip_compile.costs.model_costs import ModelCosts
from adaskip_compile.display.notebook_text import ShownAsText
from adaskip_compile.display.plots import new_axes
from adaskip_compile.files.model_identity import ModelIdentity, check_identity
from adaskip_compile.files.versioned_json import DocumentFormat
from adaskip_compile.profiling.map_files import read_maps, write_maps
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import DamagedFileError, OptionError, ProfileError
from adaskip_passes.stream.stream import ResidualStream

SCALE_KINDS = ("token", "frobenius")
# So many of the most similar sublayers are shown as text.
_SHOWN = 12

PROFILE_FORMAT = DocumentFormat(
    "adaskip-profile", 2, remedy="measure the model with adaskip_compile.profile(model, samples) or `adaskip profile`"
)


@dataclass(frozen=True)
class SublayerProfile:
    """What was measured of one sublayer, with a the residual stream before it and b after it.

    All four tuples have one entry a sample, in the same order.

    Args:
        path: The module path, such as ``model.layers.3.self_attn``.
        kind: ``attention``, ``ssm`` or ``ffn``.
        stateful: Whether it reads or writes the cache.
        similarity: Mean over the sample's tokens of cosine(a, b) (paper Eq. 2).
        scale_token: Mean over the sample's tokens of ||b|| / ||a|| (paper Eq. 3).
        scale_frobenius: ||b|| / ||a|| of the sample's whole tensors, as in the authors' code.
        tokens: Number of tokens.

    Raises:
        ProfileError: There are no samples, not as many of each measurement, or one is not a finite number.
    """

    path: str
    kind: str
    stateful: bool
    similarity: tuple[float, ...]
    scale_token: tuple[float, ...]
    scale_frobenius: tuple[float, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path or not isinstance(self.kind, str):
            raise ProfileError(f"a sublayer's path and kind are text, not {self.path!r} and {self.kind!r}")
        if not isinstance(self.stateful, bool):
            raise ProfileError(f"sublayer {self.path}: stateful is True or False, not {self.stateful!r}")
        measured = (self.similarity, self.scale_token, self.scale_frobenius, self.tokens)
        if not self.similarity or len(set(map(len, measured))) != 1:
            lengths = ", ".join(str(len(values)) for values in measured)
            raise ProfileError(
                f"sublayer {self.path}: needs as many samples of each measurement, at least 1, got {lengths}"
            )
        for name in ("similarity", "scale_token", "scale_frobenius"):
            self._check_values(name, is_finite_number, "finite numbers")
        self._check_values("tokens", lambda count: type(count) is int and count > 0, "positive integers")

    @property
    def samples(self) -> int:
        """How many samples were measured."""
        return len(self.similarity)

    @property
    def mean_similarity(self) -> float:
        """Mean over the samples of the similarity (paper Eq. 2); the same in whatever order they came."""
        return _mean(self.similarity)

    def mean_scale(self, kind: str = "token") -> float:
        """Return the mean over the samples of the scale: ``token`` (paper Eq. 3) or ``frobenius``."""
        if kind not in SCALE_KINDS:
            raise OptionError(f"unknown scale {kind!r}; known are {', '.join(SCALE_KINDS)}")
        return _mean(self.scale_token if kind == "token" else self.scale_frobenius)

    def merge(self, other: SublayerProfile) -> SublayerProfile:
        """Return the profile of the samples of both."""
        if (self.path, self.kind, self.stateful) != (other.path, other.kind, other.stateful):
            raise ProfileError(
                f"cannot merge profiles: they differ in a sublayer, {_headline(self)} and {_headline(other)}"
            )
        return SublayerProfile(
            self.path,
            self.kind,
            self.stateful,
            self.similarity + other.similarity,
            self.scale_token + other.scale_token,
            self.scale_frobenius + other.scale_frobenius,
            self.tokens + other.tokens,
        )

    def _check_values(self, name: str, valid: Callable[[object], bool], wanted: str) -> None:
        for value in getattr(self, name):
            if not valid(value):
                raise ProfileError(f"sublayer {self.path}: {name} holds {value!r}; it takes {wanted}")


@dataclass(frozen=True)
class LayerProfile:
    """What was measured of one layer as a whole, with a the residual stream before it and b after it.

    Args:
        paths: Its sublayers, two or more, in stream order.
        similarity: Mean over each sample's tokens of cosine(a, b), one a sample; 1 minus ShortGPT's block influence.

    Raises:
        ProfileError: There are fewer sublayers, or a similarity is not a finite number.
    """

    paths: tuple[str, ...]
    similarity: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.paths) < 2 or not all(isinstance(path, str) for path in self.paths):
            raise ProfileError(f"a layer holds two or more sublayers, by their paths, and not {self.paths!r}")
        if not self.similarity or not all(map(is_finite_number, self.similarity)):
            raise ProfileError(f"layer of {self.paths[0]}: similarity takes finite numbers, at least 1")

    @property
    def mean_similarity(self) -> float:
        """Mean over the samples of the similarity; the same in whatever order they came."""
        return _mean(self.similarity)

    def merge(self, other: LayerProfile) -> LayerProfile:
        """Return the profile of the samples of both."""
        if self.paths != other.paths:
            raise ProfileError(f"cannot merge profiles: one has a layer of {self.paths}, another one of {other.paths}")
        return LayerProfile(self.paths, self.similarity + other.similarity)


@dataclass(frozen=True)
class JointStep:
    """One step of a joint order: skip ``path`` too.

    Args:
        path: The sublayer that is skipped from this step on.
        compensation: What stood in its place when the loss was measured.
        loss: The mean divergence from the full model, in nats a token, with it and all before it skipped.

    Raises:
        ProfileError: The loss is not a finite number.
    """

    path: str
    compensation: str
    loss: float

    def __post_init__(self) -> None:
        if not is_finite_number(self.loss):
            raise ProfileError(f"the loss after skipping {self.path} is {self.loss!r}; it takes a finite number")


@dataclass(frozen=True)
class Profile(ShownAsText):
    """What was measured of every sublayer of one model; ``str()`` of it is a table of the most similar ones.

    Args:
        model: The model that was measured; None where it cannot be told from others.
        sublayers: All sublayers, in the order of the residual stream.
        layers: Those layers that were measured as a whole; profiles of earlier versions have none.
        costs: What the sublayers cost, to plan for a speed-up at a context length; None where it is not known.
        maps: By path, what :func:`adaskip_compile.fit` fitted to stand in the place of a sublayer, one of each form.
        joint_order: What :func:`adaskip_compile.order_by_loss` found to skip, one after another.

    Raises:
        ProfileError: There are no sublayers, two have one path, or they differ in their number of samples.
    """

    model: ModelIdentity | None
    sublayers: tuple[SublayerProfile, ...]
    layers: tuple[LayerProfile, ...] = ()
    costs: ModelCosts | None = None
    maps: Mapping[str, tuple[StreamMap, ...]] = field(default_factory=dict)
    joint_order: tuple[JointStep, ...] = ()

    def __post_init__(self) -> None:
        if not self.sublayers:
            raise ProfileError("a profile needs at least one sublayer")
        paths = [sublayer.path for sublayer in self.sublayers]
        for path in paths:
            if paths.count(path) > 1:
                raise ProfileError(f"a profile names each sublayer once, and {path} {paths.count(path)} times here")
        for sublayer in self.sublayers:
            if sublayer.samples != self.samples:
                raise ProfileError(
                    f"every sublayer sees every sample, but {paths[0]} saw {self.samples} and {sublayer.path} "
                    f"{sublayer.samples}"
                )
        for layer in self.layers:
            if not {*layer.paths} <= {*paths} or len(layer.similarity) != self.samples:
                raise ProfileError(
                    f"the layer of {layer.paths[0]} is not of these sublayers and {self.samples} samples"
                )
        if self.costs is not None and [one.path for one in self.costs.sublayers] != paths:
            raise ProfileError("the costs are not of these sublayers")
        for path in (*self.maps, *(step.path for step in self.joint_order)):
            if path not in paths:
                raise ProfileError(f"a map or a step of the joint order is of {path}, which is no sublayer here")

    def __str__(self) -> str:
        ranked = self.ranking()
        width = max(len(one.path) for one in ranked[:_SHOWN])
        lines = [
            f"{len(ranked)} sublayers of {'a model' if self.model is None else self.model.name}, {self.samples} samples",
            f"{'most similar':<{width}}  {'kind':<9}  similarity  {'scale':>6}",
        ]
        lines += [
            f"{one.path:<{width}}  {one.kind:<9}  {one.mean_similarity:>10.4f}  {one.mean_scale():.4f}"
            for one in ranked[:_SHOWN]
        ]
        left = len(ranked) - _SHOWN
        return "\n".join([*lines, *([f"and {left} more: profile.ranking()"] if left > 0 else [])])

    @property
    def samples(self) -> int:
        """How many samples were measured."""
        return self.sublayers[0].samples

    def ranking(self) -> tuple[SublayerProfile, ...]:
        """Return all sublayers of all kinds in one ranking, most similar first; equals stay in stream order."""
        return tuple(sorted(self.sublayers, key=lambda sublayer: -sublayer.mean_similarity))

    def plot(self, axes: Any = None) -> Any:
        """Draw the similarity of each sublayer by its depth, a line for each kind, and return the matplotlib ``Axes``.

        Args:
            axes: Where to draw; None for a figure of its own.

        Raises:
            OptionError: matplotlib is not installed.
        """
        axes = new_axes() if axes is None else axes
        kinds: dict[str, list[tuple[int, float]]] = {}
        for index, sublayer in enumerate(self.sublayers):
            kinds.setdefault(sublayer.kind, []).append((index, sublayer.mean_similarity))
        for kind, points in kinds.items():
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=kind)
        model = "a model" if self.model is None else self.model.name
        title = f"Similarity by depth: {model}, {self.samples} samples"
        axes.set(title=title, xlabel="sublayer", ylabel="cosine of the stream before and after")
        axes.legend()
        return axes

    def merge(self, *others: Profile) -> Profile:
        """Return the profile of the samples of this one and ``others``.

        Maps and joint orders of several do not add up: the result has none where two of them have some.

        Raises:
            ProfileError: They are of different models, or of different sublayers.
        """
        merged = self
        for other in others:
            merged = merged._merge(other)
        return merged

    def check(self, model: ModelIdentity, *, source: str = "this profile") -> None:
        """Raise :class:`ForeignFileError`, beginning with ``source``, if this was measured on another model."""
        if self.model is not None:
            check_identity(self.model, model, source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to ``path``, whole or not at all.

        Raises:
            FileError: The file cannot be written.
        """
        costs = None if self.costs is None else self.costs.to_payload()
        plain = asdict(replace(self, costs=None, maps={}))
        PROFILE_FORMAT.write(path, {**plain, "costs": costs, "maps": write_maps(path, self.maps)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Return the profile in the file at ``path``.

        Raises:
            FileError: The file is missing, damaged, of a newer version, or no profile.
        """
        payload = PROFILE_FORMAT.read(path)
        try:
            sublayers = tuple(SublayerProfile(**_tuples(entry)) for entry in payload["sublayers"])
            # Version 1 had none of what follows.
            layers = tuple(LayerProfile(**_tuples(entry)) for entry in payload.get("layers", ()))
            costs = payload.get("costs")
            known = None if costs is None else ModelCosts.from_payload(costs)
            steps = tuple(JointStep(**entry) for entry in payload.get("joint_order", ()))
            maps = read_maps(path, payload.get("maps"))
            return cls(ModelIdentity.from_payload(payload["model"]), sublayers, layers, known, maps, steps)
        except (AttributeError, KeyError, TypeError, ValueError, ProfileError, DamagedFileError) as error:
            raise PROFILE_FORMAT.damaged(path, _reason(error)) from error

    def _merge(self, other: Profile) -> Profile:
        difference = self.model and other.model and self.model.difference(other.model)
        if difference:
            raise ProfileError(
                f"cannot merge profiles of different models: seen from the first, {difference} in another"
            )
        if len(self.sublayers) != len(other.sublayers):
            raise ProfileError(
                f"cannot merge profiles: one has {len(self.sublayers)} sublayers and another {len(other.sublayers)}"
            )
        pairs = zip(self.sublayers, other.sublayers, strict=True)
        # Where one was not measured layer by layer, neither are they together.
        layers = zip(self.layers, other.layers, strict=True) if len(self.layers) == len(other.layers) else ()
        return Profile(
            self.model or other.model,
            tuple(ours.merge(theirs) for ours, theirs in pairs),
            tuple(ours.merge(theirs) for ours, theirs in layers),
            self.costs or other.costs,
            {} if self.maps and other.maps else {**self.maps, **other.maps},
            () if self.joint_order and other.joint_order else self.joint_order or other.joint_order,
        )


def is_finite_number(value: object) -> bool:
    """Return whether ``value`` is an integer or a float, and neither NaN nor an infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _mean(values: tuple[float, ...]) -> float:
    # fsum rounds once, at the end: the order of the samples cannot be seen in the result.
    return math.fsum(values) / len(values)


def _headline(sublayer: SublayerProfile) -> str:
    return f"{sublayer.path} ({sublayer.kind}, {'stateful' if sublayer.stateful else 'stateless'})"


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def make_profile(
    identity: ModelIdentity | None,
    stream: ResidualStream,
    rows: list[torch.Tensor],
    tokens: list[int],
    layers: Sequence[tuple[str, ...]] = (),
    costs: ModelCosts | None = None,
) -> Profile:
    """Return the profile of ``rows``, one ``f32[sublayers + layers, 3]`` a sample in the order of ``insert-probes``.

    ``layers`` are those that were measured as one, beside the sublayers; ``costs`` is what all of them cost.
    """
    table = torch.stack(rows).double().cpu().tolist()
    sublayers = tuple(
        SublayerProfile(
            path=sublayer.path,
            kind=sublayer.kind,
            stateful=sublayer.stateful,
            similarity=tuple(sample[index][0] for sample in table),
            scale_token=tuple(sample[index][1] for sample in table),
            scale_frobenius=tuple(sample[index][2] for sample in table),
            tokens=tuple(tokens),
        )
        for index, sublayer in enumerate(stream.sublayers)
    )
    measured = tuple(
        LayerProfile(layer, tuple(sample[index][0] for sample in table))
        for index, layer in enumerate(layers, start=len(sublayers))
    )
    return Profile(identity, sublayers, measured, costs)
