"""Fit the maps of a prompt's body one after the other, each on the stream as the maps before it leave it.

Two streams run side by side through every sublayer, over all samples: the full model's, and that of the model whose
earlier sublayers are replaced already. The map of a sublayer takes the second and aims at the first, so it puts right
what the maps before it have done wrong. Fitted one by one, each on the full model's stream, their errors add up.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.display.progress import show_progress
from adaskip_compile.files.model_identity import unwrapped
from adaskip_compile.fitting.gated_maps import UnitFinder, Units
from adaskip_compile.fitting.least_squares import BranchStatistics, Moments, MomentsOf, as_tokens, fit_gated, fit_map
from adaskip_compile.planning.prompt_skips import HEAD, TAIL, PromptSkips
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.profiles import is_finite_number
from adaskip_compile.profiling.profiling import run_samples
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import LegalityError, OptionError, ProfileError
from adaskip_passes.ir.graph import output_values
from adaskip_passes.pipeline.pipeline import PipelineResult, run_pipeline
from adaskip_passes.pipelines import CANONICALISE, CUT, USE_KERNELS, canonicalised
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.stream.stream import ResidualStream

# One sample in so many is held out, to choose the ridge and to tell the error.
_HELD_OUT = 4
# Of so many samples it is looked what a unit adds.
_LOOKED_AT = 4


def fit_prompt_skips(
    model: nn.Module,
    paths: Collection[str],
    samples: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    max_samples: int = 20,
    rank: int | None = None,
    unit_share: float = 0.0,
    head: int = HEAD,
    tail: int = TAIL,
    in_sequence: bool = True,
    windows: Mapping[str, int] | None = None,
    progress: bool = True,
) -> PromptSkips:
    """Return what skips ``paths`` for the body of a prompt, with a map for each, fitted on ``samples``.

    With a ``unit_share``, a gated FFN is imitated by that share of its own units where that misses less than a low-rank map.

    Costs about two forward passes over the samples, whatever the number of sublayers, and holds two values of the
    stream for each sample, ``2 * tokens * d_model`` numbers. Every fourth sample is held out to choose the ridge.

    Args:
        model: The model.
        paths: The sublayers to skip: attention, or stateless ones.
        samples: Texts, which need a ``tokenizer``, or token ids; as mixed as those to be served, and longer than
            ``head + tail`` tokens.
        tokenizer: Turns texts into token ids.
        max_samples: At most so many of ``samples`` are used.
        rank: Of low-rank maps; by default a quarter of the stream's width.
        unit_share: How many of an FFN's units a gated map has, from 0 (there are none) to 1.
        head: How many first rows run in full.
        tail: How many last rows run in full.
        in_sequence: Whether a map takes the stream as the maps before it leave it; otherwise the full model's, to compare.
        windows: By path, how many tokens a token of the body sees in an attention that is not skipped
            (:class:`~adaskip_compile.planning.prompt_skips.PromptSkips`); the maps after it make up for what it misses.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: The rank or the share makes no sense.
        UnknownSublayerError: The model has no sublayer of that path.
        LegalityError: A sublayer carries a state that cannot be kept without running it, or takes no window.
        ProfileError: No samples, texts without a tokenizer, a sample too short, or a stream that overflows.
        CaptureError: The model is not captured as one graph.
    """
    fitter = SequenceFitter(model, samples, tokenizer=tokenizer, max_samples=max_samples)
    return fitter.fit(
        paths,
        rank=rank,
        unit_share=unit_share,
        head=head,
        tail=tail,
        in_sequence=in_sequence,
        windows=windows,
        progress=progress,
    )


class SequenceFitter:
    """Fits maps for any sublayers of one model on one set of samples: the model is captured once.

    Takes what :func:`fit_prompt_skips` takes, and raises what it raises.
    """

    def __init__(
        self, model: nn.Module, samples: Iterable[str | torch.Tensor], *, tokenizer: Any = None, max_samples: int = 20
    ) -> None:
        self._collector = _Collector()
        self._least = min(
            run_samples(
                unwrapped(model),
                self._collector,
                samples,
                tokenizer=tokenizer,
                max_samples=max_samples,
                progress=False,
            )
        )
        # Every sample in the full model, on its way, and before which sublayer it stands.
        self._begun, self._at = list(self._collector.steps()), 0

    def begin_at(self, paths: Collection[str]) -> None:
        """Run the samples on to the first of ``paths``, before which nothing will be skipped: no fit does so again."""
        if not paths:
            return
        stream = self._collector.streams[0]
        first = min(stream.by_path(path).index for path in paths)
        with torch.no_grad():
            for steps in self._begun:
                for _ in range(first - self._at):
                    steps.run_sublayer()
        self._at = max(self._at, first)

    def fit(
        self,
        paths: Collection[str],
        *,
        rank: int | None = None,
        unit_share: float = 0.0,
        head: int = HEAD,
        tail: int = TAIL,
        in_sequence: bool = True,
        windows: Mapping[str, int] | None = None,
        progress: bool = True,
    ) -> PromptSkips:
        """Return what skips ``paths`` for the body of a prompt, with a map for each."""
        windows = windows or {}
        if self._least <= head + tail:
            raise ProfileError(
                f"a sample has {self._least} tokens; maps of a prompt's body need more than {head + tail}"
            )
        stream, width = self._collector.streams[0], self._collector.width
        for path in paths:
            sublayer = stream.by_path(path)
            if sublayer.recurrent:
                raise LegalityError(f"{path} carries a state ({sublayer.kind}) that cannot be kept without running it")
        asked = max(1, width // 4) if rank is None else rank
        if type(asked) is not int or not 0 < asked <= width:
            raise OptionError(f"rank={rank!r}: takes a number from 1 to the width of the stream, {width}")
        if not is_finite_number(unit_share) or not 0 <= unit_share <= 1:
            raise OptionError(f"unit_share={unit_share!r}: takes a share of an FFN's units, from 0 to 1")
        chosen = [sublayer for sublayer in stream.sublayers if sublayer.path in set(paths)]
        windowed = {stream.by_path(path) for path in windows}
        for sublayer in (*chosen, *windowed):
            if sublayer.index < self._at:
                raise OptionError(f"{sublayer.path} lies before the sublayer at which this fitter begins")
        with_windows = self._collector.with_windows(windows, head, tail)
        runs = [_TwoStreams(steps.fork(), in_sequence, with_windows) for steps in self._begun]
        maps: dict[str, StreamMap] = {}
        last = chosen[-1].index if chosen else -1
        ahead = stream.sublayers[self._at : last + 1]
        for sublayer in show_progress(ahead, len(ahead), progress, "fitting"):
            with torch.no_grad():
                for run in runs:
                    run.advance(apart=sublayer in windowed)
                if sublayer in chosen:
                    maps[sublayer.path] = self._fitted(sublayer.path, runs, asked, unit_share, head)
                    for run in runs:
                        run.replace(maps[sublayer.path], head, tail)
        skipped = tuple(SkippedSublayer(one.path, one.kind, one.stateful, 1.0, None) for one in chosen)
        return PromptSkips(skipped, maps, head, tail, windows=dict(windows))

    def _fitted(self, path: str, runs: Sequence[_TwoStreams], rank: int, unit_share: float, head: int) -> StreamMap:
        width, device = runs[0].before.shape[-1], runs[0].before.device
        fitted, held_out = (BranchStatistics.zeros(width, device) for _ in range(2))
        for statistics, a, b in _split(runs, head, fitted, held_out):
            statistics.add(a, b)
        low_rank = fit_map("low_rank", fitted, held_out, rank=rank)
        looked_at = [run.before for run in runs[:_LOOKED_AT]]
        found = self._collector.unit_finder.units(path, looked_at, unit_share) if unit_share else None
        gated = None if found is None else _fitted_units(found, runs, head)
        return gated if gated is not None and _error(gated) < _error(low_rank) else low_rank


def _fitted_units(units: Units, runs: Sequence[_TwoStreams], head: int) -> StreamMap:
    count, width = units.gate.shape
    fitted, held_out = (Moments.of_features(count, width, units.gate.device) for _ in range(2))
    for moments, a, b in _split(runs, head, fitted, held_out):
        a, b = as_tokens(a), as_tokens(b)
        moments.count(units(a), b - a)
    return fit_gated(units.gate, units.value, fitted, held_out)


def _split(
    runs: Sequence[_TwoStreams], head: int, fitted: MomentsOf, held_out: MomentsOf
) -> Iterator[tuple[MomentsOf, torch.Tensor, torch.Tensor]]:
    """Yield of each sample which of the two it counts for, and the stream to fit from and to aim at without its first rows."""
    for number, run in enumerate(runs, 1):
        yield held_out if number % _HELD_OUT == 0 else fitted, run.before[:, head:], run.wanted[:, head:]


def _error(one: StreamMap) -> float:
    assert one.error is not None  # it is fitted
    return one.error


class _Collector:
    """A Dynamo backend that keeps the graphs of the samples and what they were called with, and computes nothing."""

    def __init__(self) -> None:
        self.streams: list[ResidualStream] = []
        self.runs = 0
        self._first: fx.GraphModule | None = None
        self._whole: dict[fx.GraphModule, PipelineResult] = {}
        self._calls: list[tuple[fx.GraphModule, ResidualStream, tuple[Any, ...]]] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        canonical = canonicalised(gm, (*CANONICALISE, *USE_KERNELS))
        self.streams.append(canonical.stream)
        self._first = self._first or gm
        wiring = None if canonical.stream.problems else run_pipeline(canonical.gm, canonical.stream, CUT)
        if wiring is not None:
            self._whole[wiring.gm] = canonical

        def run(*values: Any) -> Any:
            self.runs += 1
            if wiring is not None:
                self._calls.append((wiring.gm, wiring.stream, values))
            # Nobody reads them: the model only puts them into the object that it returns.
            return tuple(torch.empty(0) if one is not None else None for one in output_values(gm))

        return run

    @property
    def width(self) -> int:
        """The width of the stream."""
        value = self.streams[0].sublayers[0].stream_in.meta["example_value"]
        return int(value.shape[-1])

    @functools.cached_property
    def unit_finder(self) -> UnitFinder:
        """What finds the units of gated FFNs, in the graph of the first sample."""
        assert self._first is not None  # there are samples
        plain = canonicalised(self._first)  # no kernels of ours stand in for what is looked for
        return UnitFinder(plain.gm, plain.stream, self._calls[0][2])

    def with_windows(self, windows: Mapping[str, int], head: int, tail: int) -> dict[fx.GraphModule, PipelineResult]:
        """Return of each graph the same one with ``windows`` in it: node by node, for nothing but operands differs."""
        body = SkipBodyRows(head=head, tail=tail, windows=tuple(windows.items()))
        found = {gm: run_pipeline(one.gm, one.stream, (body, *CUT)) for gm, one in self._whole.items() if windows}
        for one in found.values():
            for path in windows:
                if path not in one.stream.windowed:
                    raise LegalityError(
                        f"{path}: its attention is not known to be causal and no more: it takes no window"
                    )
        return found

    def steps(self) -> Iterator[_Steps]:
        """Yield what runs each sample sublayer by sublayer."""
        for gm, stream, values in self._calls:
            yield _Steps(gm, stream, dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True)))


class _Steps:
    """One sample on its way through a graph that was cut at its sublayers; ``values`` are those that are still read."""

    def __init__(self, gm: fx.GraphModule, stream: ResidualStream, values: dict[fx.Node, Any], at: int = 0) -> None:
        self._gm, self._stream, self._values, self._at = gm, stream, values, at
        self._nodes = list(gm.graph.nodes)
        self._ends = {one.stream_out: one for one in stream.sublayers}
        # What the graph returns is not asked for; of each sublayer the stream before it is, once it has ended.
        self._done: dict[fx.Node, list[fx.Node]] = {}
        last = {source: node for node in self._nodes if node.op != "output" for source in self._read_by(node)}
        for source, node in last.items():
            self._done.setdefault(node, []).append(source)

    def _read_by(self, node: fx.Node) -> list[fx.Node]:
        return [*node.all_input_nodes, *([self._ends[node].stream_in] if node in self._ends else [])]

    def fork(self, others: Mapping[fx.GraphModule, PipelineResult] | None = None) -> _Steps:
        """Return the same place on the same way, or in the graph that ``others`` give for this one."""
        if not others:
            return _Steps(self._gm, self._stream, dict(self._values), self._at)
        other = others[self._gm]
        images = dict(zip(self._nodes, other.gm.graph.nodes, strict=True))
        return _Steps(other.gm, other.stream, {images[node]: value for node, value in self._values.items()}, self._at)

    def run_sublayer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run on to the end of the next sublayer; return the stream before and after it."""
        interpreter = fx.Interpreter(self._gm, garbage_collect_values=False)
        interpreter.env = self._values
        while True:
            node = self._nodes[self._at]
            self._at += 1
            if node.op == "placeholder":
                continue
            before = self._values.get(self._ends[node].stream_in) if node in self._ends else None
            self._values[node] = interpreter.run_node(node)
            for source in self._done.get(node, ()):
                del self._values[source]
            if before is not None:
                return before, self._values[node]

    def set_stream(self, b: torch.Tensor) -> None:
        """Go on with ``b`` in the place of the value of the stream that was returned last."""
        self._values[self._nodes[self._at - 1]] = b


class _TwoStreams:
    """One sample in both models: ``before`` is the stream to fit from, ``wanted`` the one to aim at, at one sublayer."""

    before: torch.Tensor
    wanted: torch.Tensor

    def __init__(self, full: _Steps, in_sequence: bool, with_windows: Mapping[fx.GraphModule, PipelineResult]) -> None:
        self._full, self._in_sequence, self._with_windows = full, in_sequence, with_windows
        self._skipping: _Steps | None = None

    def advance(self, *, apart: bool) -> None:
        """Run both through the next sublayer; they are one until one is replaced, or they go ``apart`` in it."""
        if apart:
            self._part()
        full_before, self.wanted = self._full.run_sublayer()
        self._own_before, self._own_after = full_before, self.wanted
        if self._skipping is not None:
            self._own_before, self._own_after = self._skipping.run_sublayer()
        self.before = self._own_before if self._in_sequence else full_before

    def replace(self, one: StreamMap, head: int, tail: int) -> None:
        """Put ``one`` in the place of the sublayer for the body of the skipping model."""
        skipping = self._part()
        a, b = self._own_before, self._own_after
        body = one(a[:, head:-tail])
        skipping.set_stream(torch.cat([b[:, :head], body.to(b.dtype), b[:, -tail:]], 1))

    def _part(self) -> _Steps:
        if self._skipping is None:
            self._skipping = self._full.fork(self._with_windows)
        return self._skipping
