"""The one list of options of the ``adaskip`` backend, and the only place that reads environment variables."""

from __future__ import annotations

import ast
import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from adaskip_compile.costs.timers import Measured, Roofline
from adaskip_compile.files.model_identity import ModelIdentity
from adaskip_compile.planning.plan_options import PlanOptions
from adaskip_compile.planning.planner import plan_by_options
from adaskip_compile.planning.policy_names import PROFILED_POLICIES
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.errors import OptionError
from adaskip_passes.pipeline.pipeline import Pass

CACHE_VARIABLE = "ADASKIP_CACHE_DIR"
# What is chosen by, once something is known of the model.
_CHOICES = ("skip", "speedup", "policy", "seed", "phase", "window", "scale", "compensation")
INNER_BACKENDS = ("inductor", "eager")
REGIONS = ("shared", "whole")


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="adaskip", options={...})`` and ``adaskip_compile.compile``.

    Raises:
        OptionError: An option has a value that it cannot take.
    """

    plan: SkipPlan | str | os.PathLike[str] | None = None
    """What to skip: a plan, or the file of one."""

    profile: Profile | str | os.PathLike[str] | None = None
    """What was measured of the model, to plan from: a profile, or the file of one."""

    skip: int = 8
    """How many sublayers to skip, where no plan is given."""

    speedup: float | None = None
    """In place of `skip`, the target acceleration (1.14 skips 8 of 64 sublayers, 1.33 skips 16); with `context`, the ratio of times."""

    policy: str = "adaskip"
    """How to choose the sublayers: `adaskip` ranks them by similarity; the others are explained in `adaskip plan --help`."""

    seed: int = 0
    """What the policy `random` draws with."""

    phase: str = "both"
    """Where to skip: in `both` phases, or only in `prefill` or `decode`."""

    context: int | None = None
    """The context length at which prefill and decode are to be `speedup` times as fast, by predicted times."""

    times: Measured | Roofline | str | os.PathLike[str] | None = None
    """What tells times for `context`: a calibration or the file of one; a roofline of round figures by default."""

    max_loss: float | None = None
    """The loss in nats a token that the profile's joint order predicts at most, in place of `skip`."""

    window: int = 20
    """How many decoded tokens of a request are measured before it skips further FFNs; 0 for none."""

    scale: str = "token"
    """The ratio of norms that makes up for a skipped sublayer: `token` (mean over tokens) or `frobenius` (whole tensor)."""

    compensation: str = "scale"
    """What stands in the place of a skipped sublayer: its `scale`, `none`, or a map that the profile holds: `channel`, `low_rank`, `affine`."""

    learn: int | None = None
    """How many requests run in full, probed, to plan from with `skip` and its like; None, the default, learns and skips nothing."""

    cache_dir: str | os.PathLike[str] | None = None
    """Where to keep what was learned and compiled; by default `$ADASKIP_CACHE_DIR`, or else `~/.cache/adaskip`."""

    keep_captures: bool = True
    """Whether `adaskip_compile.compile` keeps captured graphs there, so that the next process need not trace the model again."""

    inner: str | Callable[..., Any] = "inductor"
    """What compiles the rewritten graphs: `inductor`, `eager`, or a function of a graph and example inputs, as `torch.compile` takes for a backend."""

    passes: Sequence[Pass] = ()
    """Passes of your own: each captured graph goes through them first, verified and recorded like the others (docs/passes.md)."""

    regions: str = "shared"
    """What is compiled as one: `shared` regions, each distinct one once, or the `whole` graph."""

    cuda_graphs: bool = True
    """Whether decode steps on a CUDA device over a cache of fixed size are recorded once as CUDA graphs, and replayed."""

    debug_dir: str | os.PathLike[str] | None = None
    """Where to write each graph before and after every pass, with a `repro.py` that runs the passes again; None for nowhere."""

    def __post_init__(self) -> None:
        self._check_planning()
        self._check_type("plan", SkipPlan)
        self._check_type("profile", Profile)
        self._check_type("cache_dir")
        self._check_type("debug_dir")
        if self.plan is not None and self.profile is not None:
            raise OptionError("plan and profile are both given: a plan is made from a profile, so give one of them")
        if self.learn is not None and (type(self.learn) is not int or self.learn < 1):
            raise OptionError(f"learn={self.learn!r}: takes a number of requests, 1 or more, or None")
        for name in ("keep_captures", "cuda_graphs"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name}={getattr(self, name)!r}: takes True or False")
        if self.inner not in INNER_BACKENDS and not callable(self.inner):
            raise OptionError(
                f"inner={self.inner!r}: takes one of {', '.join(INNER_BACKENDS)}, or a backend's function"
            )
        if self.regions not in REGIONS:
            raise OptionError(f"regions={self.regions!r}: takes one of {', '.join(REGIONS)}")
        object.__setattr__(self, "passes", self._checked_passes())

    def _checked_passes(self) -> tuple[Pass, ...]:
        if isinstance(self.passes, str) or not isinstance(self.passes, Iterable):
            raise OptionError(f"passes={self.passes!r}: takes a list of passes")
        passes = tuple(self.passes)
        for item in passes:
            named = isinstance(getattr(item, "name", None), str) and callable(getattr(item, "apply", None))
            if isinstance(item, type) or not is_dataclass(item) or not named:
                raise OptionError(
                    f"passes: {item!r} is no pass; one is an object of a frozen dataclass that has a name and a method "
                    "apply(gm, stream)"
                )
        return passes

    def _check_planning(self) -> None:
        self._check_type("times", Measured, Roofline)
        _ = self.planning  # checks itself
        if self.profile is None and self.plan is None:
            goal = next((name for name in ("context", "max_loss") if getattr(self, name) is not None), None)
            goal = goal or ("compensation" if self.compensation not in ("none", "scale") else None)
            if goal or self.policy in PROFILED_POLICIES:
                asked = f"{goal}={getattr(self, goal)!r}" if goal else f"policy={self.policy!r}"
                instead = (
                    "; adaskip_compile.compile(model, tokenizer=tokenizer, learn=20, max_loss=0.02) finds what prompts can skip"
                    if goal == "max_loss"
                    else ""
                )
                raise OptionError(
                    f"{asked} needs a profile: what is learned from requests does not tell enough{instead}"
                )
            changed = [name for name in _CHOICES if getattr(self, name) != getattr(type(self), name)]
            if self.learn is None and changed:
                raise OptionError(
                    f"{changed[0]}={getattr(self, changed[0])!r} says what to skip of a model of which nothing is known: give "
                    "profile= too, or learn=20 to learn from the first 20 requests"
                )

    @property
    def planning(self) -> PlanOptions:
        """Those that say what plan to make of a profile."""
        return PlanOptions(**{field.name: getattr(self, field.name) for field in fields(PlanOptions)})

    @property
    def runs_in_full(self) -> bool:
        """Whether nothing is asked for that would skip: neither plan nor profile, nor to learn."""
        return self.plan is None and self.profile is None and self.learn is None

    @classmethod
    def from_mapping(cls, options: Mapping[Any, Any] | None) -> Options:
        """Return the options in ``options``, a dict as ``torch.compile`` hands it on.

        Raises:
            OptionError: An option is unknown (the message suggests the nearest) or cannot take its value.

        >>> Options.from_mapping({"polcy": "adaskip"})
        Traceback (most recent call last):
        adaskip_passes.errors.OptionError: unknown option 'polcy': did you mean 'policy'? Options are plan, profile, \
skip, speedup, policy, seed, phase, context, times, max_loss, window, scale, compensation, learn, cache_dir, keep_captures, inner, passes, regions, cuda_graphs, debug_dir
        """
        known = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f": did you mean {near[0]!r}?" if near else "."
                raise OptionError(f"unknown option {name!r}{hint} Options are {', '.join(known)}")
        return cls(**(options or {}))

    @classmethod
    def describe(cls) -> str:
        """Return all options as a Markdown table, made from the documentation of the fields."""
        lines = ["| option | default | meaning |", "| --- | --- | --- |"]
        meanings = _field_docstrings(cls)
        lines.extend(f"| `{field.name}` | `{field.default!r}` | {meanings[field.name]} |" for field in fields(cls))
        return "\n".join(lines)

    @property
    def cache_folder(self) -> Path:
        """The folder for what was learned and compiled; it need not exist yet."""
        chosen = self.cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/adaskip"
        return Path(chosen).expanduser()

    def _check_type(self, name: str, *types: type) -> None:
        value = getattr(self, name)
        if value is None or isinstance(value, (*types, os.PathLike)) or (isinstance(value, str) and value):
            return
        wanted = " or ".join([*(f"a {kind.__name__}" for kind in types), "the path of a file" if types else "a folder"])
        raise OptionError(f"{name}={value!r}: takes {wanted}, or None")


def resolve_plan(options: Options, identity: ModelIdentity | None) -> SkipPlan | None:
    """Return the plan that ``options`` give, itself or by a profile, read from a file where they name one.

    Args:
        options: The options; None is returned where they give neither a plan nor a profile.
        identity: The model that the plan is to be used for; None where there is none to check it against.

    Raises:
        FileError: A file cannot be used, or the plan or profile was made for another model.
        OptionError: The options ask for more than the profiled model allows.
    """
    if options.plan is not None:
        given = options.plan
        found = given if isinstance(given, SkipPlan) else SkipPlan.load(given)
        if identity is not None:
            found.check(identity, source="this plan" if found is given else str(given))
        return found
    if options.profile is not None:
        named = options.profile
        profile = named if isinstance(named, Profile) else Profile.load(named)
        if identity is not None:
            profile.check(identity, source="this profile" if profile is named else str(named))
        return plan_by_options(profile, options.planning)
    return None


def _field_docstrings(cls: type) -> dict[str, str]:
    """Return the string that stands under each field; Python drops them when it compiles the class."""
    [definition] = ast.parse(dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value))
    return found
