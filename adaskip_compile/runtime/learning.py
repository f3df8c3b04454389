"""Learn what to skip from the first requests, and remember it for the next process.

What is remembered is the profile: it holds whatever options the next process plans with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from adaskip_compile.files.model_identity import ModelIdentity
from adaskip_compile.files.versioned_json import digest
from adaskip_compile.options import Options
from adaskip_compile.planning.planner import plan_by_options
from adaskip_compile.planning.policies import largest_skip
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile, make_profile
from adaskip_passes.errors import FileError, ForeignFileError, OptionError
from adaskip_passes.pipeline.pipeline import pass_text
from adaskip_passes.stream.stream import ResidualStream


class Learner:
    """Collects one row of statistics a sublayer and request, until there are ``options.learn`` of them.

    A request is under way meanwhile: what goes wrong is no error, and ``note`` is told.
    """

    def __init__(self, options: Options, identity: ModelIdentity | None, note: Callable[[str], None]) -> None:
        self.options, self.identity, self._note = options, identity, note
        self._wanted = options.learn or 1
        self._rows: list[torch.Tensor] = []
        self._tokens: list[int] = []

    @property
    def seen(self) -> int:
        """How many requests it has learned from so far."""
        return len(self._rows)

    @property
    def path(self) -> Path | None:
        """Where this model's profile is remembered, or None for a model that cannot be told from others."""
        if self.identity is None or self.identity.weights is None:
            return None
        # Passes of the user's own may change what the sublayers compute.
        own = "-" + digest(" ".join(map(pass_text, self.options.passes))) if self.options.passes else ""
        return self.options.cache_folder / "profiles" / f"{self.identity.key}{own}.json"

    def remembered(self) -> Profile | None:
        """Return the profile that an earlier process left, or None; one that is unusable counts as none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            profile = Profile.load(self.path)
            assert self.identity is not None
            profile.check(self.identity)
        except (FileError, ForeignFileError):
            return None
        return profile if profile.samples >= self._wanted else None

    def add(self, rows: torch.Tensor, stream: ResidualStream, tokens: int) -> Profile | None:
        """Take the statistics of one request, ``f32[sublayers, 3]``; return the profile once there are enough."""
        self._rows.append(rows)
        self._tokens.append(tokens)
        if len(self._rows) < self._wanted:
            return None
        profile = make_profile(self.identity, stream, self._rows, self._tokens)
        if self.path is not None:
            try:
                profile.save(self.path)
            except FileError as error:
                self._note(f"what was learned is not kept for the next process: {error}")
        return profile

    def plan(self, profile: Profile) -> SkipPlan:
        """Return the plan that the options ask for; where this model allows it not, the most below that it does."""
        try:
            return plan_by_options(profile, self.options.planning)
        except OptionError as error:
            found = self._most_allowed(profile)
            self._note(f"{error}; skips {len(found.all_paths)}")
            return found

    def _most_allowed(self, profile: Profile) -> SkipPlan:
        limit = largest_skip(profile, self.options.policy, self.options.seed)
        for count in range(limit if self.options.speedup is not None else min(limit, self.options.skip), 0, -1):
            try:
                return plan_by_options(profile, replace(self.options.planning, skip=count, speedup=None))
            except OptionError:  # no whole layers
                continue
        return plan_by_options(profile, replace(self.options.planning, skip=0, speedup=None))
