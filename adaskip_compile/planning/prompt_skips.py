"""What the body of a prompt skips while its keys and values are kept: the part of a plan that leaves no holes.

The rows of a prompt are its tokens. The first ``head`` and the last ``tail`` of them run in full. For the others, the
body, a skipped FFN does not run, and of a skipped attention only what makes keys and values, from the stream as it is
then. Of other attentions they may see a window of the tokens before them alone. So the cache has no holes, and whatever
comes after the prompt may run in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from adaskip_compile.display.plots import new_axes
from adaskip_compile.planning.quality import Quality
from adaskip_passes.errors import PlanError
from adaskip_passes.specialise.needed_rows import stopped_at
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.stream.stream import ResidualStream

if TYPE_CHECKING:
    from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
    from adaskip_compile.profiling.stream_maps import StreamMap

# 32 rows at the end lose a fifth less of perplexity than 16, and 64 no less, of 10 and 10 deepest of Qwen2.5-Coder-0.5B.
HEAD, TAIL = 1, 32


@dataclass(frozen=True)
class Trade:
    """What one set of sublayers was measured to lose, and what it gains.

    Args:
        attentions: Of how many deepest layers the attentions are skipped.
        ffns: Of how many the FFNs.
        speedup: How much less a prompt multiplies, its keys and values, its edges and the maps counted.
        within: Whether it keeps the budget.
        quality: What it was measured to lose; of facts nothing where likelihood alone is over the budget.
        windows: Of how many deepest layers the attentions see a window, those that are skipped not counted.
    """

    attentions: int
    ffns: int
    speedup: float
    within: bool
    quality: Quality
    windows: int = 0

    def __str__(self) -> str:
        quality = self.quality
        answers = "-" if quality.answer_loss is None else f"{quality.answer_loss:+.3f}"
        return (
            f"{self.attentions:>10} {self.windows:>8} {self.ffns:>5}  {quality.perplexity:>17}  {quality.retrieval:>14}  {answers:>7}  "
            f"{self.speedup:>7.2f}x  {'within' if self.within else 'over'}"
        )


TRADES_HEADING = "attentions  windows  FFNs         perplexity   needles found  answers  speed-up  budget"


def depths_text(attentions: int, ffns: int, windows: int) -> str:
    """Say how many sublayers of each kind are left out, and how many attentions have a window."""
    return f"{attentions} attentions, {ffns} FFNs{f', {windows} windows' if windows else ''}"


@dataclass(frozen=True)
class PromptSkips:
    """What a plan skips for the body of a prompt.

    Args:
        skipped: The sublayers, in the order of the residual stream; their scales stand where there is no map.
        maps: By path, what replaces a skipped sublayer instead of its scale.
        head: How many first rows run in full. The first token of a prompt is often an attention sink, whose stream is
            like no other's.
        tail: How many last rows run in full, 1 or more.
        measured: What this set was measured to lose, and what it gains; None where it was not.
        frontier: All sets that were tried with it.
        windows: By path, how many tokens before it (itself counted) a token of the body sees in an attention that runs;
            the first ``head`` are always seen. An attention that has a window of its own keeps that.

    Raises:
        PlanError: A sublayer is named twice, a map is of one that is not skipped, or a number makes no sense.
    """

    skipped: tuple[SkippedSublayer, ...]
    maps: Mapping[str, StreamMap] = field(default_factory=dict)
    head: int = HEAD
    tail: int = TAIL
    measured: Trade | None = None
    frontier: tuple[Trade, ...] = ()
    windows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self.paths:
            if self.paths.count(path) > 1:
                raise PlanError(f"the prompt skips {path} {self.paths.count(path)} times; name it once")
        for path, window in self.windows.items():
            if path in self.paths:
                raise PlanError(f"the prompt skips {path}, and a window is given for it: one of them")
            if type(window) is not int or window < 1:
                raise PlanError(f"the window of {path} is {window!r}; it takes a number of tokens, 1 or more")
        for path in self.maps:
            if path not in self.paths:
                raise PlanError(f"a map is given for {path}, which the prompt does not skip")
        for name, least in (("head", 0), ("tail", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise PlanError(f"{name} is {value!r}; it takes a number of rows, {least} or more")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the skipped sublayers."""
        return tuple(sublayer.path for sublayer in self.skipped)

    @property
    def named_paths(self) -> tuple[str, ...]:
        """The paths of the sublayers of which the body leaves something out: those skipped, and those with a window."""
        return (*self.paths, *self.windows)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each skipped sublayer, by path."""
        return {sublayer.path: sublayer.scale for sublayer in self.skipped}

    def plot(self, axes: Any = None) -> Any:
        """Draw what each set of the frontier loses over how much it saves, and return the matplotlib ``Axes``.

        Args:
            axes: Where to draw; None for a figure of its own.

        Raises:
            OptionError: matplotlib is not installed.
            PlanError: Nothing was measured, so there is no frontier.
        """
        if not self.frontier:
            raise PlanError("this plan has no frontier to draw: it was not made within a loss")
        axes = new_axes() if axes is None else axes
        for within, label in ((True, "within the budget"), (False, "over")):
            trades = [trade for trade in self.frontier if trade.within is within]
            losses = [100 * math.expm1(trade.quality.loss) for trade in trades]
            errors = [100 * trade.quality.loss_error for trade in trades]
            axes.errorbar([trade.speedup for trade in trades], losses, errors, fmt="o", capsize=2, label=label)
            for trade, loss in zip(trades, losses, strict=True):
                text = depths_text(trade.attentions, trade.ffns, trade.windows)
                axes.annotate(
                    text, (trade.speedup, loss), xytext=(4, 4), textcoords="offset points", fontsize="x-small"
                )
        axes.set(xlabel="prompt, times as fast by arithmetic", ylabel="perplexity above the full model's, %")
        axes.legend()
        return axes

    def as_pass(self, stream_paths: Iterable[str]) -> SkipBodyRows:
        """Return the pass that skips so; ``stream_paths`` are all of the stream, in order."""
        forms = tuple((path, self.maps[path].form, self.maps[path].rank) for path in self.paths if path in self.maps)
        stream_paths = tuple(stream_paths)
        windows = tuple((path, self.windows[path]) for path in stream_paths if path in self.windows)
        skipped = tuple(path for path in stream_paths if path in self.paths)
        return SkipBodyRows(skipped, forms, self.head, self.tail, windows)

    @property
    def least_rows(self) -> int:
        """How many rows a prompt has at least whose body is worth skipping for."""
        return SkipBodyRows(head=self.head, tail=self.tail).least_rows

    def apply_to(self, rows: int) -> bool:
        """Whether a prompt of so many rows has a body worth skipping for; a shorter one runs in full.

        So do the few tokens that a draft proposes, which are no prompt.
        """
        return bool(self.named_paths) and rows >= self.least_rows

    def to_dict(self) -> dict[str, Any]:
        """Return what it says as JSON holds it; of maps their form, rank and error."""
        maps = {path: {"form": one.form, "rank": one.rank, "error": one.error} for path, one in self.maps.items()}
        return {**asdict(replace(self, maps={})), "maps": maps}


def computed_all_the_same(gm: fx.GraphModule, stream: ResidualStream, body: SkipBodyRows) -> Iterator[str]:
    """Yield a note for each sublayer that ``body`` skips in the graph, and that is computed of the whole prompt all the same."""
    for path, window in body.windows:
        if path not in stream.windowed:
            yield f"{path}: its attention is not known to be causal and no more, so a window of {window} tokens is not used"
    for path, operation in stopped_at(gm, stream, body.head + body.tail):
        yield f"{path}: {operation} is not known to work row by row, so what it needs is computed of the whole prompt"
