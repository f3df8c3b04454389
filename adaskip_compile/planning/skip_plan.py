"""Plans: what to skip, and the file of it.

The offline choice is :func:`adaskip_compile.planning.planner.plan`, the online one, from a request's first tokens,
:func:`adaskip_compile.runtime.window.extra_sublayers` (AdaSkip section 3). A skipped sublayer is replaced by b = scale * a (paper Eq. 4), with a
the residual stream before it and b after it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import nn

from adaskip_compile.display.notebook_text import ShownAsText
from adaskip_compile.files.model_identity import ModelIdentity, check_identity
from adaskip_compile.files.versioned_json import DocumentFormat
from adaskip_compile.planning.prompt_skips import HEAD, TAIL, TRADES_HEADING, PromptSkips, Trade
from adaskip_compile.planning.quality import Quality
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.map_files import read_maps, write_maps
from adaskip_compile.profiling.profiles import SCALE_KINDS, is_finite_number
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import FileError, LegalityError, PlanError, ProfileError, UnknownSublayerError
from adaskip_passes.ir.module_paths import submodule_paths

PLAN_FORMAT = DocumentFormat(
    "adaskip-plan", 4, remedy="plan from a profile with adaskip_compile.plan(profile).save(path) or `adaskip plan`"
)


@dataclass(frozen=True)
class RampStep:
    """What changes at one decoded token of a request and holds from then on.

    Args:
        after: The decoded token that it begins with; 0 is the first that goes through decode.
        skipped: The sublayers that are skipped too. A stateful one keeps no cache from then on and never runs again.
        resumed: Paths of stateless sublayers, skipped until then, that run again.

    Raises:
        PlanError: Nothing changes, or ``after`` is no number of tokens.
    """

    after: int
    skipped: tuple[SkippedSublayer, ...] = ()
    resumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if type(self.after) is not int or self.after < 0:
            raise PlanError(f"a ramp step begins after {self.after!r}; it takes a number of decoded tokens, 0 or more")
        if not self.skipped and not self.resumed:
            raise PlanError(f"the ramp step after {self.after} decoded tokens changes nothing")


@dataclass(frozen=True)
class SkipPlan(ShownAsText):
    """What to skip for a request; ``str()`` of it is :meth:`describe`.

    Args:
        skipped: The sublayers skipped in prefill and for the whole request, in the order of the residual stream.
        beta: The similarity from which an FFN is skipped too after the window; None adds none.
        window: How many decoded tokens are measured for that; 0 adds none.
        policy: What chose the plan: one of :data:`adaskip_compile.planning.policy_names.POLICIES`, ``explicit`` or ``none``.
        scale_kind: Which ratio the scales are, and those measured in the window: ``token`` or ``frobenius``.
        model: The model that the plan is for; None for any model that has these sublayers.
        ramp: What changes as the request is decoded, earliest first.
        maps: By path, what stands in the place of a skipped sublayer instead of its scale.
        prompt: What the body of the prompt skips besides, its keys and values kept; None for nothing.

    Raises:
        PlanError: A sublayer is named twice, a map is of one that is not skipped, or a field has a value that makes no sense.
        LegalityError: The ramp lets a stateful sublayer run again.
    """

    skipped: tuple[SkippedSublayer, ...]
    beta: float | None
    window: int
    policy: str
    scale_kind: str
    model: ModelIdentity | None
    ramp: tuple[RampStep, ...] = ()
    maps: Mapping[str, StreamMap] = field(default_factory=dict)
    prompt: PromptSkips | None = None

    def __post_init__(self) -> None:
        _require_once(sublayer.path for sublayer in self.skipped)
        for path in () if self.prompt is None else self.prompt.named_paths:
            if path in self.paths:
                raise PlanError(
                    f"the plan skips {path} with a hole in the cache, and with its keys and values kept: one of them"
                )
        _check_ramp(self.skipped, self.ramp)
        for path in self.maps:
            if path not in self.all_paths:
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
    def all_paths(self) -> tuple[str, ...]:
        """The paths of the sublayers that are skipped at any time."""
        ramped = (sublayer.path for step in self.ramp for sublayer in step.skipped)
        return tuple(dict.fromkeys((*self.paths, *ramped)))

    @property
    def named_paths(self) -> tuple[str, ...]:
        """The paths of all sublayers that the plan names, those of the prompt's body included."""
        return tuple(dict.fromkeys((*self.all_paths, *(() if self.prompt is None else self.prompt.named_paths))))

    @property
    def all_scales(self) -> dict[str, float]:
        """The scale of each sublayer that is skipped at any time, by path."""
        return {sublayer.path: sublayer.scale for step in self.ramp for sublayer in step.skipped} | self.scales

    def paths_at(self, decoded: float) -> frozenset[str]:
        """Return the paths that are skipped when ``decoded`` tokens have been decoded; infinity tells of the end."""
        return frozenset(self.scales_at(decoded))

    def scales_at(self, decoded: float) -> dict[str, float]:
        """Return the scale of each sublayer that is skipped for the token after ``decoded`` ones, by path: the ramp."""
        now = self.scales
        for step in self.ramp:
            if step.after <= decoded:
                now = {path: scale for path, scale in now.items() if path not in step.resumed}
                now |= {sublayer.path: sublayer.scale for sublayer in step.skipped}
        return now

    def map_forms(self, paths: Iterable[str]) -> tuple[tuple[str, str, int], ...]:
        """Return (path, form, rank) of each map that stands for one of ``paths``, as ``skip-sublayers`` takes them."""
        return tuple((path, self.maps[path].form, self.maps[path].rank) for path in paths if path in self.maps)

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
    def from_prompt_scales(cls, scales: Mapping[str, float], *, head: int = HEAD, tail: int = TAIL) -> SkipPlan:
        """Return an explicit plan that skips for the body of the prompt alone, and keeps its keys and values.

        >>> SkipPlan.from_prompt_scales({"model.layers.3.self_attn": 0.98}).prompt.paths
        ('model.layers.3.self_attn',)
        """
        skipped = tuple(SkippedSublayer(path, "", None, scale, None) for path, scale in scales.items())
        return replace(cls.none(), policy="explicit", prompt=PromptSkips(skipped, head=head, tail=tail))

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
        known = [path for path in submodule_paths(model) if path]
        for path in self.named_paths:
            if path not in known:
                inner = _below(self.named_paths, known)
                if inner:
                    raise UnknownSublayerError(
                        f"the plan skips {path}, which {type(model).__name__} has as {inner}.{path}: it was made for the "
                        f"model inside; compile that, model.{inner}"
                    )
                near = difflib.get_close_matches(path, known, n=3, cutoff=0.0)
                raise UnknownSublayerError(
                    f"the plan skips {path}, which {type(model).__name__} lacks; nearest of its modules: "
                    f"{', '.join(near) or 'it has none'}. `adaskip inspect` lists its sublayers"
                )

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """Return the plan as a table of text."""
        if not self.named_paths and not (self.prompt and self.prompt.frontier):
            return "skips nothing"
        return "\n".join((*self._prompt_lines(), *self._request_lines()))

    def _prompt_lines(self) -> Iterable[str]:
        if self.prompt is None:
            return
        if self.prompt.frontier:
            yield "tried for the prompt, its keys and values kept:"
            yield TRADES_HEADING
            yield from map(str, self.prompt.frontier)
        if not self.prompt.named_paths:
            yield (
                "none keeps the budget and is faster: the prompt runs in full"
                if self.prompt.frontier
                else "the prompt runs in full"
            )
            return
        rows = " and ".join(
            f"its {which} {_counted(number, 'token')}"
            for which, number in (("first", self.prompt.head), ("last", self.prompt.tail))
            if number
        )
        left_out = [f"skips {_counted(len(self.prompt.skipped), 'sublayer')}"] if self.prompt.skipped else []
        if self.prompt.windows:
            left_out.append(f"looks back no further than a window in {_counted(len(self.prompt.windows), 'attention')}")
        yield f"the prompt {' and '.join(left_out)} for all but {rows}, and keeps its keys and values; policy: {self.policy}"
        yield from self._table(self.prompt.skipped, self.prompt.maps)
        for window in sorted({*self.prompt.windows.values()}):
            paths = (path for path, one in self.prompt.windows.items() if one == window)
            yield f"a window of {_counted(window, 'token')}: {', '.join(paths)}"

    def _request_lines(self) -> Iterable[str]:
        if not self.all_paths:
            yield "decoding runs in full"
            return
        online = "no FFN is added online"
        if self.beta is not None and self.window:
            online = f"after {self.window} decoded tokens also every FFN of similarity {self.beta:.4f} or more"
        yield f"skips {_counted(len(self.skipped), 'sublayer')}; {online}; scale: {self.scale_kind}, policy: {self.policy}"
        yield from self._table(self.skipped, self.maps)
        for step in self.ramp:
            yield f"from decoded token {step.after} on {_change(step)}"
            yield from self._table(step.skipped, self.maps)

    def _table(self, skipped: Sequence[SkippedSublayer], maps: Mapping[str, StreamMap]) -> Iterable[str]:
        if not skipped:
            return
        width = max(map(len, ("sublayer", *self.named_paths)))
        yield f"{'sublayer':<{width}}  {'kind':<9}  similarity  {'scale':>6}{'  in its place' if maps else ''}"
        for sublayer in skipped:
            similarity = "-" if sublayer.similarity is None else f"{sublayer.similarity:.4f}"
            row = f"{sublayer.path:<{width}}  {sublayer.kind or '-':<9}  {similarity:>10}  {sublayer.scale:.4f}"
            found = maps.get(sublayer.path)
            yield row if found is None else f"{row}  {found}"

    def to_dict(self) -> dict[str, Any]:
        """Return what the plan says as JSON holds it; of maps their form, rank and error."""
        maps = {path: {"form": one.form, "rank": one.rank, "error": one.error} for path, one in self.maps.items()}
        prompt = None if self.prompt is None else self.prompt.to_dict()
        return {**asdict(replace(self, maps={}, prompt=None)), "maps": maps, "prompt": prompt}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``, whole or not at all.

        Raises:
            FileError: The file cannot be written.
        """
        held = {name: (one,) for name, one in self.maps.items()}
        content = self.to_dict()
        if self.prompt is not None:
            held |= {f"{_PROMPT}{name}": (one,) for name, one in self.prompt.maps.items()}
            del content["prompt"]["maps"]
        PLAN_FORMAT.write(path, {**content, "maps": write_maps(path, held)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SkipPlan:
        """Return the plan in the file at ``path``.

        Raises:
            FileError: The file is missing, damaged, of a newer version, or no plan.
        """
        payload = PLAN_FORMAT.read(path)
        try:
            maps = {name: one for name, (one,) in read_maps(path, payload.get("maps")).items()}
            fields: dict[str, Any] = {
                **payload,
                "skipped": _sublayers(payload["skipped"]),
                "model": ModelIdentity.from_payload(payload["model"]),
                "ramp": tuple(map(_ramp_step, payload.get("ramp", ()))),  # version 1 had none, and no maps
                "maps": {name: one for name, one in maps.items() if not name.startswith(_PROMPT)},
                "prompt": _prompt_skips(payload.get("prompt"), maps),  # nor had version 2, nor windows version 3
            }
            return cls(**fields)
        except KeyError as error:
            raise PLAN_FORMAT.damaged(path, f"it lacks {error}") from error
        except (AttributeError, TypeError, ValueError, PlanError, ProfileError) as error:
            if isinstance(error, FileError):
                raise
            raise PLAN_FORMAT.damaged(path, error) from error


# What the names of the prompt's maps begin with in the file of maps: no module path does.
_PROMPT = "prompt/"


def _prompt_skips(entry: Mapping[str, Any] | None, maps: Mapping[str, StreamMap]) -> PromptSkips | None:
    if entry is None:
        return None
    held = {name.removeprefix(_PROMPT): one for name, one in maps.items() if name.startswith(_PROMPT)}
    measured = entry["measured"]
    fields: dict[str, Any] = {
        **entry,
        "skipped": _sublayers(entry["skipped"]),
        "maps": held,
        "measured": None if measured is None else _trade(measured),
        "frontier": tuple(map(_trade, entry["frontier"])),
    }
    return PromptSkips(**fields)


def _trade(entry: Mapping[str, Any]) -> Trade:
    fields: dict[str, Any] = {**entry, "quality": Quality(**entry["quality"])}
    return Trade(**fields)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _require_once(paths: Iterable[str]) -> None:
    named: set[str] = set()
    for path in paths:
        if path in named:
            raise PlanError(f"a plan names each sublayer once, and {path} 2 times here")
        named.add(path)


def _check_ramp(skipped: tuple[SkippedSublayer, ...], ramp: tuple[RampStep, ...]) -> None:
    """Raise an error unless each step can follow on what is skipped before it."""
    for one, other in pairwise(ramp):
        if other.after <= one.after:
            raise PlanError(f"ramp steps begin one after another, and {other.after} follows on {one.after} here")
    now = {sublayer.path: sublayer for sublayer in skipped}
    for step in ramp:
        _require_once((*(sublayer.path for sublayer in step.skipped), *step.resumed))
        for path in step.resumed:
            if path not in now:
                raise PlanError(f"the ramp lets {path} run again after {step.after} tokens, and it was not skipped")
            if now.pop(path).stateful:
                raise LegalityError(
                    f"the ramp lets {path} run again after {step.after} tokens: it is stateful, and has no cache entries "
                    "for the tokens before; only stateless sublayers can run again"
                )
        for sublayer in step.skipped:
            if sublayer.path in now:
                raise PlanError(f"the ramp skips {sublayer.path} after {step.after} tokens, and it is skipped already")
            now[sublayer.path] = sublayer


def _below(paths: Sequence[str], known: Collection[str]) -> str | None:
    """Return the module of ``known`` below which all ``paths`` lie, or None."""
    ends = [path[: -len(paths[0]) - 1] for path in known if path.endswith(f".{paths[0]}")]
    return next((inner for inner in ends if all(f"{inner}.{path}" in known for path in paths)), None)


def _change(step: RampStep) -> str:
    parts = [f"skips {len(step.skipped)} more"] if step.skipped else []
    return "; ".join([*parts, *([f"runs again {', '.join(step.resumed)}"] if step.resumed else [])])


def _sublayers(entries: Iterable[Mapping[str, Any]]) -> tuple[SkippedSublayer, ...]:
    return tuple(SkippedSublayer(**entry) for entry in entries)


def _ramp_step(entry: Mapping[str, Any]) -> RampStep:
    return RampStep(entry["after"], _sublayers(entry["skipped"]), tuple(entry["resumed"]))
