"""The variants of one captured graph: specialised on first use, and those last used kept.

A capture is never repeated: a variant is made from the graph by passes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from adaskip_compile.capture.dynamo import collector_paused
from adaskip_compile.kv_cache.appends import CacheGrowth
from adaskip_compile.lowering.cuda_graphs import RecordedRun, recordable
from adaskip_compile.lowering.lowering import Lowering, Runnable
from adaskip_compile.lowering.shape_checks import ShapeCheck
from adaskip_compile.options import Options
from adaskip_compile.runtime.debug_folders import run_passes
from adaskip_passes.analysis.effects import positions_written
from adaskip_passes.errors import PassError, VerificationError
from adaskip_passes.ir.graph import fake_tensor, output_values
from adaskip_passes.pipeline.pipeline import Pass, PassRecord, PipelineResult, run_pipeline
from adaskip_passes.specialise.append_in_place import AppendInPlace
from adaskip_passes.specialise.needed_rows import stopped_at
from adaskip_passes.specialise.pipelines import row_passes, skip_passes
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.stream.stream import ResidualStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A graph specialised for one skip set and one set of probes.

    ``body`` is what it skips for the body of a prompt. ``shapes`` checks the cache outputs of skipped sublayers, for
    which those of kept ones stand; ``grown`` tells which of the cache entries that grow it has a use for.
    """

    skipped: tuple[str, ...]
    probed: tuple[str, ...]
    body: SkipBodyRows | None
    run: Runnable
    shapes: ShapeCheck
    grown: tuple[bool, ...]
    history: tuple[PassRecord, ...]
    seconds: float


# (path, form, rank) of each map of the stream that stands for a skipped sublayer, as ``skip-sublayers`` takes them.
Maps = tuple[tuple[str, str, int], ...]
# Of each graph, so many are kept, those last used: every request may choose FFNs of its own, and making a variant
# again takes no longer than a step.
_VARIANTS = 64


class VariantCache:
    """Makes the variants of one graph, and keeps them.

    Args:
        gm: The graph as it was captured.
        stream: Its residual stream.
        growth: The same graph with a cache that grows in place.
        options: Of the session.
        model_name: What to call the model in logs and folders.
        note: Told what the user should know.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        stream: ResidualStream,
        growth: CacheGrowth,
        options: Options,
        model_name: str,
        note: Callable[[str], None],
    ) -> None:
        self._gm, self._stream, self._growth = gm, stream, growth
        self._options, self._model_name, self._note = options, model_name, note
        self.made: OrderedDict[tuple[object, ...], Variant] = OrderedDict()
        self.lowering = Lowering(options.inner, options.regions, note)
        # While it learns, a graph runs a few dozen times: not worth an optimising compiler's time.
        self._plain = Lowering("eager", "whole")
        self._narrowed: dict[SkipBodyRows | None, PipelineResult] = {}
        self.prepared: dict[tuple[Lowering, SkipBodyRows | None, bool], tuple[fx.GraphModule, ResidualStream]] = {}
        # Who makes a variant holds the second one, so that calls of other variants need not wait.
        self._lock, self._making = threading.Lock(), threading.Lock()
        recorded = options.cuda_graphs and stream.phase == "decode" and not growth.grows
        self._recorded = frozenset(positions_written(gm)) if recorded and recordable(gm) else None

    def get(
        self,
        skipped: tuple[str, ...],
        probed: tuple[str, ...],
        maps: Maps = (),
        body: SkipBodyRows | None = None,
        *,
        learning: bool = False,
    ) -> Variant:
        """Return the variant that skips and probes so; ``learning`` makes one that nothing is compiled for."""
        lowering = self._plain if learning else self.lowering
        key = (skipped, probed, maps, body, lowering.inner)
        variant = self._known(key)
        if variant is not None:
            return variant
        with self._making, collector_paused():
            # Another thread may have made it meanwhile.
            variant = self._known(key) or self._specialise(skipped, probed, maps, body, lowering)
        with self._lock:
            self.made[key] = variant
            if len(self.made) > _VARIANTS:
                self.made.popitem(last=False)
        return variant

    def values(self) -> tuple[Variant, ...]:
        """The variants that are kept, those last used last."""
        return tuple(self.made.values())

    def __len__(self) -> int:
        return len(self.made)

    def _known(self, key: tuple[object, ...]) -> Variant | None:
        """Return the variant of ``key`` where it has been made; those last used are kept."""
        with self._lock:
            if key in self.made:
                self.made.move_to_end(key)
            return self.made.get(key)

    def _specialise(
        self,
        skipped: tuple[str, ...],
        probed: tuple[str, ...],
        maps: Maps,
        body: SkipBodyRows | None,
        lowering: Lowering,
    ) -> Variant:
        started = time.perf_counter()
        # Probes measure all rows of a prompt.
        before = self.narrowed(body) if self._stream.phase == "prefill" and not probed else None
        gm, stream = (self._growth.gm, self._growth.stream) if before is None else (before.gm, before.stream)
        key = (lowering, body, before is not None)
        if key not in self.prepared:
            self.prepared[key] = lowering.prepare(gm, stream)
            if lowering.uncut:
                self._note(f"{lowering.uncut}; each skip set compiles it as a whole")
        passes = skip_passes(skipped, probed, maps)
        if self._options.debug_dir is not None:
            rows = row_passes(body) if before is not None else ()
            self._write_debug_folder((AppendInPlace(), *rows, *passes), skipped, probed)
        try:
            result = run_pipeline(*self.prepared[key], passes)
        except VerificationError:
            raise
        except PassError:
            # A region cannot go that still gives a skipped cache entry its shape; a part of it can.
            result = run_pipeline(gm, stream, passes)
            lowering = Lowering(lowering.inner, "whole", self._note)
        grown = self._growth.used(result.gm)
        run = lowering.lower(result.gm)
        if self._recorded is not None and lowering.inner == "inductor":
            run = RecordedRun(run, self._recorded, self._note)
        seconds = time.perf_counter() - started
        log.info(
            "%s: made the %s graph that skips %d and probes %d sublayers, in %.1f s",
            *(self._model_name, self._stream.phase, len(skipped), len(probed), seconds),
        )
        history = (*(() if before is None else before.history), *result.history)
        return Variant(skipped, probed, body, run, ShapeCheck(self._gm, result.gm), grown, history, seconds)

    def narrowed(self, body: SkipBodyRows | None) -> PipelineResult:
        """Return the graph of a prompt that computes the rows that are read, but for those that ``body`` skips."""
        if body not in self._narrowed:
            result = run_pipeline(self._growth.gm, self._growth.stream, row_passes(body))
            for path, operation in () if body is None else stopped_at(result.gm, result.stream, body.head + body.tail):
                self._note(
                    f"{path}: {operation} is not known to work row by row, so what it needs is computed of the whole prompt"
                )
            if body is not None and _gives_every_row(result):
                self._note(
                    "the model returns something of every token of a prompt (logits or hidden states): for its body that of a "
                    "model that skips, and so is a loss made of it (labels=); generate() reads the last token's alone"
                )
            self._narrowed[body] = result
        return self._narrowed[body]

    def _write_debug_folder(self, passes: Sequence[Pass], skipped: tuple[str, ...], probed: tuple[str, ...]) -> None:
        """Run ``passes`` on the graph as it was captured, op by op, for people to read."""
        title = f"{self._model_name}-{self._stream.phase}-{len(skipped)}-skipped-{len(probed)}-probed"
        run_passes(self._gm, self._stream, passes, debug_dir=self._options.debug_dir, title=title)


def _gives_every_row(found: PipelineResult) -> bool:
    """Tell whether the graph returns something of every row of the stream, cache aside: logits, or the stream itself."""
    stream = fake_tensor(found.stream.sublayers[0].stream_in)
    shapes = [
        value.shape for node in output_values(found.gm) if node is not None and (value := fake_tensor(node)) is not None
    ]
    return stream is not None and any(
        len(shape) == stream.dim() and str(shape[1]) == str(stream.shape[1]) for shape in shapes
    )
