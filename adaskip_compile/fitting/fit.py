"""Fit compensations: run a model over samples and learn, for each sublayer, maps that can stand in its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.display.progress import show_progress
from adaskip_compile.files.model_identity import identify, unwrapped
from adaskip_compile.fitting.least_squares import FITTED_FORMS, BranchStatistics, fit_map
from adaskip_compile.profiling.profiles import Profile
from adaskip_compile.profiling.profiling import run_samples
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import OptionError
from adaskip_passes.pipelines import canonicalised
from adaskip_passes.stream.stream import ResidualStream, Sublayer

# One sample in so many is held out, to choose the ridge and to tell the error.
_HELD_OUT = 4


def fit(
    model: nn.Module,
    profile: Profile,
    samples: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    max_samples: int = 20,
    forms: Sequence[str] = ("channel", "low_rank"),
    rank: int | None = None,
    sublayers: Collection[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Return ``profile`` with maps that can stand in the place of skipped sublayers, fitted on ``samples``.

    Fit on texts as mixed as those to be served: a map that has seen one kind of text alone helps there and may hurt
    elsewhere. One pass over the samples; it holds ``2 d^2`` float64 numbers a sublayer, twice, whatever their
    length. Every fourth sample is held out to choose the ridge.

    Args:
        model: The profiled model.
        profile: What was measured of it.
        samples: Texts, which need a ``tokenizer``, or token ids, as :func:`adaskip_compile.profile` takes them.
        tokenizer: Turns texts into token ids.
        max_samples: At most so many of ``samples`` are used.
        forms: Which of ``channel``, ``low_rank`` and ``affine`` to fit.
        rank: That of ``low_rank``; by default an eighth of the stream's width.
        sublayers: The paths to fit for; by default the more similar half, of which plans are made.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: There is no such form, or the rank is none of this model.
        ForeignFileError: The profile is of another model.
        UnknownSublayerError: The model has no sublayer of that path.
        ProfileError: No samples, texts without a tokenizer, a sample too short, or a stream that overflows.
        CaptureError: The model is not captured as one graph.
    """
    for form in forms:
        if form not in FITTED_FORMS:
            raise OptionError(f"forms={tuple(forms)!r}: takes some of {', '.join(FITTED_FORMS)}")
    model = unwrapped(model)
    profile.check(identify(model))
    ranking = [found.path for found in profile.ranking()]
    chosen = frozenset(ranking[: (len(ranking) + 1) // 2] if sublayers is None else sublayers)
    tap = _StreamTap(chosen)
    run_samples(
        model, tap, samples, tokenizer=tokenizer, max_samples=max_samples, progress=progress, title="measuring branches"
    )
    maps: dict[str, tuple[StreamMap, ...]] = {}
    for path, (fitted, held_out) in show_progress(tap.statistics.items(), len(chosen), progress, "fitting"):
        width = fitted.channels.shape[-1]
        asked = max(1, width // 8) if rank is None else rank
        if type(asked) is not int or not 0 < asked <= width:
            raise OptionError(f"rank={rank!r}: takes a number from 1 to the width of the stream, {width}")
        maps[path] = tuple(fit_map(form, fitted, held_out, rank=asked) for form in forms)
    return replace(profile, maps={**profile.maps, **maps})


class _StreamTap:
    """A Dynamo backend that runs each graph in full and adds up what passes through the chosen sublayers."""

    def __init__(self, paths: frozenset[str]) -> None:
        self.paths = paths
        self.streams: list[ResidualStream] = []
        self.runs = 0
        # What maps are fitted to, and what is held out.
        self.statistics: dict[str, tuple[BranchStatistics, BranchStatistics]] = {}

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        straight = canonicalised(gm)
        stream = straight.stream
        self.streams.append(stream)
        watched = [] if stream.problems else [stream.by_path(path) for path in self.paths]

        def run(*values: Any) -> Any:
            self.runs += 1
            return _Watcher(straight.gm, watched, self._add).run(*values)

        return run

    def _add(self, sublayer: Sublayer, a: torch.Tensor, b: torch.Tensor) -> None:
        if sublayer.path not in self.statistics:
            fitted, held_out = (BranchStatistics.zeros(a.shape[-1], a.device) for _ in range(2))
            self.statistics[sublayer.path] = (fitted, held_out)
        self.statistics[sublayer.path][self.runs % _HELD_OUT == 0].add(a, b)


class _Watcher(fx.Interpreter):
    """Runs a graph node by node and tells ``seen`` of the stream before and after each of ``sublayers``."""

    def __init__(self, gm: fx.GraphModule, sublayers: Sequence[Sublayer], seen: Any) -> None:
        super().__init__(gm)
        self._seen = seen
        self._starts = {one.stream_in for one in sublayers}
        self._ends = {one.stream_out: one for one in sublayers}
        self._before: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; at the end of a sublayer, tell of it."""
        value = super().run_node(n)
        if n in self._ends:
            sublayer = self._ends[n]
            self._seen(sublayer, self._before.pop(sublayer.stream_in), value)
        if n in self._starts:
            # The add may be in place: what is kept must not change.
            self._before[n] = value.clone()
        return value
