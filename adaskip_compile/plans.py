"""Plans: what to skip, and the file of it.

The offline choice is :func:`adaskip_compile.planning.plan`, the online one, from a request's first tokens,
:func:`extra_sublayers` (AdaSkip section 3). A skipped sublayer is replaced by b = scale * a (paper Eq. 4), with a
the residual stream before it and b after it.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from adaskip_compile.compensation import StreamMap
from adaskip_compile.documents import DocumentFormat
from adaskip_compile.identity import ModelIdentity, check_identity
from adaskip_compile.map_files import read_maps, write_maps
from adaskip_compile.profiles import SCALE_KINDS, is_finite_number
from adaskip_passes.errors import LegalityError, PlanError, ProfileError, UnknownSublayerError

PLAN_FORMAT = DocumentFormat(
    "adaskip-plan", 1, remedy="plan from a profile with adaskip_compile.plan(profile).save(path) or `adaskip plan`"
)


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


@dataclass(frozen=True)
class SkipPlan:
    """What to skip for a request.

    Args:
        skipped: The sublayers skipped in prefill and for the whole request, in the order of the residual stream.
        beta: The similarity from which an FFN is skipped too after the window; None adds none.
        window: How many decoded tokens are measured for that; 0 adds none.
        policy: What chose the plan: ``adaskip``, ``explicit`` or ``none``.
        scale_kind: Which ratio the scales are, and those measured in the window: ``token`` or ``frobenius``.
        model: The model that the plan is for; None for any model that has these sublayers.
        maps: By path, what stands in the place of a skipped sublayer instead of its scale.

    Raises:
        PlanError: A sublayer is named twice, a map is of one that is not skipped, or a field has a value that makes no sense.
    """

    skipped: tuple[SkippedSublayer, ...]
    beta: float | None
    window: int
    policy: str
    scale_kind: str
    model: ModelIdentity | None
    maps: Mapping[str, StreamMap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = [sublayer.path for sublayer in self.skipped]
        for path in paths:
            if paths.count(path) > 1:
                raise PlanError(f"a plan names each sublayer once, and {path} {paths.count(path)} times here")
        for path in self.maps:
            if path not in paths:
                raise PlanError(f"a map is given for {path}, which the plan does not skip")
        if self.beta is not None and not is_finite_number(self.beta):
            raise PlanError(f"beta is {self.beta!r}; it takes a finite number or None")
        if type(self.window) is not int or self.window < 0:
            raise PlanError(f"window is {self.window!r}; it takes a number of tokens, 0 or more")
        if not isinstance(self.policy, str):
            raise PlanError(f"policy is {self.policy!r}; it takes text")
        if self.scale_kind not in SCALE_KINDS:
            raise PlanError(f"scale_kind is {self.scale_kind!r}; it takes one of {', '.join(SCALE_KINDS)}")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the skipped sublayers."""
        return tuple(sublayer.path for sublayer in self.skipped)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each skipped sublayer, by path."""
        return {sublayer.path: sublayer.scale for sublayer in self.skipped}

    @classmethod
    def from_scales(cls, scales: Mapping[str, float], window: int = 0) -> SkipPlan:
        """Return an explicit plan: which sublayers to skip, and what to multiply the stream by in their place.

        There is no threshold to hold FFNs to, so the ``window`` adds none unless ``beta`` is set, with
        :func:`dataclasses.replace`.

        >>> SkipPlan.from_scales({"model.layers.3.self_attn": 0.98}).paths
        ('model.layers.3.self_attn',)
        """
        skipped = tuple(SkippedSublayer(path, "", None, scale, None) for path, scale in scales.items())
        return cls(skipped, beta=None, window=window, policy="explicit", scale_kind="token", model=None)

    @classmethod
    def none(cls) -> SkipPlan:
        """Return the plan that skips nothing, ever."""
        return cls((), beta=None, window=0, policy="none", scale_kind="token", model=None)

    def check(self, model: ModelIdentity, *, source: str = "this plan") -> None:
        """Raise :class:`ForeignFileError`, beginning with ``source``, if this plan was made for another model."""
        if self.model is not None:
            check_identity(self.model, model, source=source)

    def check_paths(self, model: nn.Module) -> None:
        """Raise :class:`UnknownSublayerError` if the plan names a sublayer that is no module of ``model``."""
        known = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
        for path in self.paths:
            if path not in known:
                near = difflib.get_close_matches(path, known, n=3, cutoff=0.0)
                raise UnknownSublayerError(
                    f"the plan skips {path}, which {type(model).__name__} lacks; nearest of its modules: "
                    f"{', '.join(near) or 'it has none'}. `adaskip inspect` lists its sublayers"
                )

    def describe(self) -> str:
        """Return the plan as a table of text."""
        if not self.skipped:
            return "skips nothing"
        online = "no FFN is added online"
        if self.beta is not None and self.window:
            online = f"after {self.window} decoded tokens also every FFN of similarity {self.beta:.4f} or more"
        width = max(map(len, ("sublayer", *self.paths)))
        count = "1 sublayer" if len(self.skipped) == 1 else f"{len(self.skipped)} sublayers"
        lines = [f"skips {count}; {online}; scale: {self.scale_kind}, policy: {self.policy}"]
        lines.append(f"{'sublayer':<{width}}  {'kind':<9}  similarity  {'scale':>6}{'  in its place' if self.maps else ''}")
        for sublayer in self.skipped:
            similarity = "-" if sublayer.similarity is None else f"{sublayer.similarity:.4f}"
            row = f"{sublayer.path:<{width}}  {sublayer.kind or '-':<9}  {similarity:>10}  {sublayer.scale:.4f}"
            found = self.maps.get(sublayer.path)
            lines.append(row if found is None else f"{row}  {found}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return what the plan says as JSON holds it; of maps their form, rank and error."""
        maps = {path: {"form": one.form, "rank": one.rank, "error": one.error} for path, one in self.maps.items()}
        return {**asdict(replace(self, maps={})), "maps": maps}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``, whole or not at all.

        Raises:
            FileError: The file cannot be written.
        """
        maps = write_maps(path, {name: (one,) for name, one in self.maps.items()})
        PLAN_FORMAT.write(path, {**self.to_dict(), "maps": maps})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SkipPlan:
        """Return the plan in the file at ``path``.

        Raises:
            FileError: The file is missing, damaged, of a newer version, or no plan.
        """
        payload = PLAN_FORMAT.read(path)
        try:
            skipped = tuple(SkippedSublayer(**entry) for entry in payload["skipped"])
            fields: dict[str, Any] = {
                **payload,
                "skipped": skipped,
                "model": ModelIdentity.from_payload(payload["model"]),
                "maps": {name: one for name, (one,) in read_maps(path, payload.get("maps")).items()},
            }
            return cls(**fields)
        except KeyError as error:
            raise PLAN_FORMAT.damaged(path, f"it lacks {error}") from error
        except (TypeError, PlanError, ProfileError) as error:
            raise PLAN_FORMAT.damaged(path, error) from error


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
