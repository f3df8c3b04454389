"""The variants of one captured graph: specialised on first use, and those last used kept.

A capture is never repeated: a variant is made from the graph by passes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from adaskip_compile.capture.dynamo import collector_paused
from adaskip_compile.kv_cache.appends import CacheAppends
from adaskip_compile.lowering.cuda_graphs import RecordedRun, recordable
from adaskip_compile.lowering.lowering import Lowering, Runnable
from adaskip_compile.lowering.shape_checks import ShapeCheck
from adaskip_compile.options import Options
from adaskip_compile.planning.prompt_skips import computed_all_the_same
from adaskip_passes.analysis.effects import positions_written
from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import fake_tensor, output_values
from adaskip_passes.pipeline.derived_graph import DerivedGraph, is_refusal
from adaskip_passes.pipeline.pipeline import AddedInput, PassRecord
from adaskip_passes.pipelines import row_passes, skip_passes
from adaskip_passes.specialise.append_in_place import GROWN
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A graph specialised for one skip set and one set of probes.

    ``body`` is what it skips for the body of a prompt. ``shapes`` checks the cache outputs of skipped sublayers, for
    which those of kept ones stand; ``grown`` tells which of the cache entries that grow it has a use for, and
    ``given`` what it takes after them.
    """

    skipped: tuple[str, ...]
    probed: tuple[str, ...]
    body: SkipBodyRows | None
    run: Runnable
    shapes: ShapeCheck
    grown: tuple[bool, ...]
    given: tuple[AddedInput, ...]
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
        appends: The same graph with a cache that grows in place.
        options: Of the session.
        model_name: What to call the model in logs and folders.
        note: Told what the user should know.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        appends: CacheAppends,
        options: Options,
        model_name: str,
        note: Callable[[str], None],
    ) -> None:
        self._gm, self._appends, self._phase = gm, appends, appends.graph.stream.phase
        self._options, self._model_name, self._note = options, model_name, note
        self.made: OrderedDict[tuple[object, ...], Variant] = OrderedDict()
        self.lowering = Lowering(options.inner, options.regions, note)
        # While it learns, a graph runs a few dozen times: not worth an optimising compiler's time.
        self._plain = Lowering("eager", "whole")
        self._narrowed: dict[SkipBodyRows | None, DerivedGraph] = {}
        # By how many rows a prompt with a body has: the graph as captured with so many, or why it cannot be.
        self._long: dict[int, DerivedGraph | str] = {}
        self.prepared: dict[tuple[Lowering, SkipBodyRows | None, bool], DerivedGraph] = {}
        # Who makes a variant holds the second one, so that calls of other variants need not wait.
        self._lock, self._making = threading.Lock(), threading.Lock()
        recorded = options.cuda_graphs and self._phase == "decode" and not appends.grows
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
        narrow = self._phase == "prefill" and not probed
        graph = self.narrowed(body) if narrow else self._appends.graph
        key = (lowering, body, narrow)
        if key not in self.prepared:
            self.prepared[key] = lowering.prepare(graph)
            if lowering.uncut:
                self._note(f"{lowering.uncut}; each skip set compiles it as a whole")
        passes = skip_passes(skipped, probed, maps)
        try:
            result = self.prepared[key].run(passes, recoverable=True)
        except PassError as error:
            if not is_refusal(error):
                raise
            # A region cannot go that still gives a skipped cache entry its shape; a part of it can.
            result = graph.run(passes)
            lowering = Lowering(lowering.inner, "whole", self._note)
        folder = result.show(f"{len(skipped)}-skipped-{len(probed)}-probed")
        if folder is not None:
            log.info("graph before and after each pass: %s", folder)
        grown = self._appends.used(result)
        run = lowering.lower(result)
        if self._recorded is not None and lowering.inner == "inductor":
            run = RecordedRun(run, self._recorded, self._note)
        seconds = time.perf_counter() - started
        log.info(
            "%s: made the %s graph that skips %d and probes %d sublayers, in %.1f s",
            *(self._model_name, self._phase, len(skipped), len(probed), seconds),
        )
        given = tuple(one for one in result.added if one.part != GROWN)
        return Variant(
            skipped, probed, body, run, ShapeCheck(self._gm, result.gm), grown, given, result.history, seconds
        )

    def skips_body(self, body: SkipBodyRows) -> bool:
        """Tell whether a prompt may skip so; where not, the note says why it runs in full."""
        if body.least_rows not in self._long:
            with self._making:
                self._with_body(body)
        found = self._long[body.least_rows]
        if isinstance(found, str):
            self._note(f"the first prompt had no body to skip for, and so prompts run in full: {found}")
        return isinstance(found, DerivedGraph)

    def _with_body(self, body: SkipBodyRows) -> DerivedGraph | str:
        """Return the graph as captured with a prompt that has a body, or why it cannot be: the first one may have been short."""
        if body.least_rows not in self._long:
            try:
                self._long[body.least_rows] = self._appends.graph.for_rows(body.least_rows, body.fewest_rows)
            except PassError as error:
                self._long[body.least_rows] = str(error)  # the error itself would hold the graphs of its frames
        return self._long[body.least_rows]

    def narrowed(self, body: SkipBodyRows | None) -> DerivedGraph:
        """Return the graph of a prompt that computes the rows that are read, but for those that ``body`` skips."""
        if body not in self._narrowed:
            graph = self._appends.graph if body is None else self._with_body(body)
            if isinstance(graph, str):
                raise PassError(graph)
            result = graph.run(row_passes(body))
            for note in () if body is None else computed_all_the_same(result.gm, result.stream, body):
                self._note(note)
            if body is not None and _gives_every_row(result):
                self._note(
                    "the model returns something of every token of a prompt (logits or hidden states): for its body that of a "
                    "model that skips, and so is a loss made of it (labels=); generate() reads the last token's alone"
                )
            self._narrowed[body] = result
        return self._narrowed[body]


def _gives_every_row(found: DerivedGraph) -> bool:
    """Tell whether the graph returns something of every row of the stream, cache aside: logits, or the stream itself."""
    stream = fake_tensor(found.stream.sublayers[0].stream_in)
    shapes = [
        value.shape for node in output_values(found.gm) if node is not None and (value := fake_tensor(node)) is not None
    ]
    return stream is not None and any(
        len(shape) == stream.dim() and str(shape[1]) == str(stream.shape[1]) for shape in shapes
    )
