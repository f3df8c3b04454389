"""Run one captured graph for many requests: pick the variant that the request's phase calls for.

A :class:`Dispatcher` is what Dynamo calls in place of the graph that it captured. It finds the
request by its cache, asks it what to skip and what to probe, and runs the variant of the graph
specialised for that. Variants are made on first use and kept: a capture is never repeated.

Where the code that a cache comes from runs uncompiled, nothing here is called: a cache that was filled under a plan
with holes must not go on there. What comes back from there with more tokens and has holes is refused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from adaskip_compile.capture.dynamo import capture_reason, collector_paused, forget_marks
from adaskip_compile.kv_cache.appends import CacheGrowth
from adaskip_compile.kv_cache.cache_object import CachePlace, find_cache_place
from adaskip_compile.kv_cache.holes_seen import find_holes
from adaskip_compile.kv_cache.request_table import ForeignRequest
from adaskip_compile.kv_cache.shared_holes import HoleMemory
from adaskip_compile.lowering.cuda_graphs import RecordedRun, recordable
from adaskip_compile.lowering.lowering import Lowering, Runnable
from adaskip_compile.lowering.shape_checks import ShapeCheck
from adaskip_compile.runtime.debug_folders import run_passes
from adaskip_compile.runtime.requests import Request
from adaskip_passes.analysis.effects import positions_written
from adaskip_passes.errors import LegalityError, PassError, VerificationError
from adaskip_passes.ir.graph import fake_tensor, output_values
from adaskip_passes.pipeline.pipeline import Pass, PassRecord, PipelineResult, run_pipeline
from adaskip_passes.specialise.append_in_place import AppendInPlace
from adaskip_passes.specialise.needed_rows import stopped_at
from adaskip_passes.specialise.pipelines import row_passes, skip_passes
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.stream.find_stream import find_counters
from adaskip_passes.stream.stream import ResidualStream

if TYPE_CHECKING:
    from adaskip_compile.runtime.session import Session

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
_EAGER = Lowering("eager", "whole")
# Of each graph, so many are kept, those last used: every request may choose FFNs of its own, and making a variant
# again takes no longer than a step.
_VARIANTS = 64


class Dispatcher:
    """The callable that stands for one captured graph; see the module's text.

    ``restored`` says that an earlier process captured it, and
    ``place`` where it found its cache objects; what is captured now is asked for it.
    """

    def __init__(
        self,
        session: Session,
        gm: fx.GraphModule,
        stream: ResidualStream,
        *,
        restored: bool = False,
        place: CachePlace | None = None,
    ) -> None:
        self.session, self.gm, self.stream = session, gm, stream
        self.restored = restored
        self.variants: OrderedDict[tuple[object, ...], Variant] = OrderedDict()
        self.lowering = Lowering(session.options.inner, session.options.regions, session.note)
        self._narrowed: dict[SkipBodyRows | None, PipelineResult] = {}
        self._prepared: dict[tuple[Lowering, SkipBodyRows | None, bool], tuple[fx.GraphModule, ResidualStream]] = {}
        self.calls = 0
        self.captured_because = None if restored else capture_reason()
        # Who makes a variant holds the second one, so that calls of other variants need not wait.
        self._lock, self._making = threading.Lock(), threading.Lock()
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        positions = {node: index for index, node in enumerate(inputs)}
        self._cache_inputs = {
            sublayer.path: tuple(positions[node] for node in sublayer.cache_inputs)
            for sublayer in stream.sublayers
            if sublayer.cache_inputs
        }
        self._cache_outputs = tuple(position for sublayer in stream.sublayers for position in sublayer.cache_outputs)
        self._written = {
            sublayer.path: self._cache_inputs[sublayer.path]
            for sublayer in stream.sublayers
            if sublayer.writes and sublayer.cache_inputs
        }
        self._hole_memory = HoleMemory(self._written)
        self._counters = tuple(positions[node] for node in find_counters(gm, stream))
        held = [node for sublayer in stream.sublayers for node in sublayer.cache_inputs]
        self.place = place if restored else find_cache_place(held)
        self._token_input = _token_input(inputs, stream)
        self._stateful = frozenset(item.path for item in stream.sublayers if item.stateful)
        self._growth = CacheGrowth(gm, stream, session.storages)
        recorded = session.options.cuda_graphs and stream.phase == "decode" and not self._growth.grows
        self._recorded = frozenset(positions_written(gm)) if recorded and recordable(gm) else None
        self._ffns = tuple(item.path for item in stream.sublayers if item.kind == "ffn" and not item.stateful)

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph on ``inputs`` as the request that they belong to calls for."""
        self.calls += 1
        reason = self.session.why_unskipped()
        if reason is not None:
            self.session.note(reason)
            self._require_no_holes(inputs, reason)
            variant = self._variant((), ())
            return variant.run(*inputs, *self._grown(variant, inputs))
        objects = self._objects()
        request = self._request(inputs, objects)
        if self.calls == 1 and not self.restored:
            request.captures.append(f"{self.stream.phase}: {self.captured_because or 'the first graph'}")
        phase = self._phase(request)
        if phase != "prefill":
            request.take_ramp_steps(self._stateful)
        request.check(frozenset(request.skipped))
        tokens = self._rows_and_tokens(inputs)[1]
        variant = self._variant_for(request, phase, tokens)
        if variant.body is not None:
            request.body_tokens += tokens - variant.body.head - variant.body.tail
        started = time.perf_counter()
        added = (*self._grown(variant, inputs), *self._stand_ins(request, variant))
        outputs = variant.run(*inputs, *added)
        request.seconds[phase] += time.perf_counter() - started
        variant.shapes.check(inputs, outputs)
        if phase == "prefill":
            self.session.prepare_decode(request)
        return self._finish(request, phase, variant, inputs, outputs, objects)

    def _require_no_holes(self, inputs: Sequence[Any], reason: str) -> None:
        """Refuse to run a request in full that has skipped: its cache lacks what the full graph would read."""
        cache = self._cache(inputs)
        if cache and not self._starts_over(inputs):
            owner = self.session.requests.look_up(self._objects(), cache)
            if owner is not None:
                owner.check(frozenset(), because=reason)

    def _objects(self) -> list[Any]:
        """Return the caller's objects that hold the cache of this call."""
        return [] if self.place is None else self.place.objects()

    def prepare(self, request: Request) -> None:
        """Make the variant that ``request`` will begin to decode with, so that its first token need not wait for it."""
        upcoming = replace(request, scales=dict(request.scales), extra=dict(request.extra), stand_ins={})
        upcoming.take_ramp_steps(self._stateful)
        self._variant_for(upcoming, self._phase(upcoming), 1)

    def _phase(self, request: Request) -> str:
        if self.stream.phase == "prefill":
            return "prefill"
        return "window" if request.window_left else "steady"

    def _cache(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        return [inputs[index] for places in self._cache_inputs.values() for index in places]

    def _request(self, inputs: Sequence[Any], objects: Sequence[Any]) -> Request:
        """Return the request that this call belongs to, whose cache ``objects`` hold."""
        cache = self._cache(inputs)
        if not cache:
            return self._start()
        length = self._growth.length(inputs)
        if length == 0 or (self.stream.phase == "prefill" and self._starts_over(inputs)):
            self._hole_memory.separate(inputs)
            return self._start()
        known = self.session.requests.find(objects, cache, length)
        if not isinstance(known, Request):
            return self._adopt(inputs, objects, length, known)
        if known.holes and length is not None and length > known.length:
            raise LegalityError(
                f"request {known.number}: its cache has grown by {length - known.length} tokens in code that adaskip did "
                f"not compile, which has read entries that {', '.join(sorted(known.holes))} never made; compile that "
                "code too, or start a new request with a new cache"
            )
        return known

    def _start(self) -> Request:
        session = self.session
        plan = session.plan_for_new_request()
        for path in plan.named_paths:
            self.stream.by_path(path)
        for path in () if plan.prompt is None else plan.prompt.paths:
            sublayer = self.stream.by_path(path)
            if sublayer.recurrent:
                raise LegalityError(
                    f"the plan skips {path} for the body of a prompt: its state ({sublayer.kind}) is carried from token to "
                    "token, and cannot be kept without running it; only attention and stateless sublayers can be skipped so"
                )
        for step in plan.ramp:
            for path in self._stateful.intersection(step.resumed):
                raise LegalityError(
                    f"the plan's ramp lets {path} run again after {step.after} decoded tokens: it is stateful, and has no "
                    "cache entries for the tokens before; only stateless sublayers can run again"
                )
        return session.requests.start(
            plan, scales=plan.scales, holes=self._stateful.intersection(plan.paths), learning=session.learning
        )

    def _starts_over(self, inputs: Sequence[Any]) -> bool:
        """Tell whether a preallocated cache is empty: its token counter stands at zero."""
        return bool(self._counters) and all(int(inputs[index]) == 0 for index in self._counters)

    def _adopt(
        self, inputs: Sequence[Any], objects: Sequence[Any], length: int | None, foreign: ForeignRequest | None
    ) -> Request:
        """Return a request for a cache without a mark of ours: one that has moved, or one filled by someone else."""
        if foreign is not None:
            foreign.check(self._stateful.intersection(self.session.plan_for_new_request().paths))
        else:
            seen = find_holes({path: inputs[places[0]] for path, places in self._cache_inputs.items()})
            moved = self.session.requests.matching(seen, length, in_object=bool(objects))
            if moved is not None:
                return moved
        request = self._start()
        request.notes.append(
            "its cache was filled by code that adaskip did not compile"
            if foreign is None
            else "its cache was filled by another compilation"
        )
        return request

    def _probes(self, request: Request, phase: str, skipped: dict[str, float]) -> tuple[str, ...]:
        if request.learning:
            return self.stream.paths if phase == "prefill" else ()
        if phase != "window":
            return ()
        return tuple(path for path in self._ffns if path not in skipped)

    def _grown(self, variant: Variant, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Return the cache entries as this call shall leave them, with room for its tokens."""
        return self._growth.entries(variant.grown, variant.skipped, inputs, *self._rows_and_tokens(inputs))

    def _stand_ins(self, request: Request, variant: Variant) -> tuple[torch.Tensor, ...]:
        """Return what ``variant`` takes in place of what it skips: scales and tensors of maps; nothing where it skips nothing."""
        if not variant.skipped and variant.body is None:
            return ()
        key = (variant.skipped, variant.body)
        known = request.stand_ins.get(key)
        if known is None:
            body = request.plan.prompt if variant.body is not None else None
            scales = {**request.skipped, **(dict[str, float]() if body is None else body.scales)}
            # In the order of the stream, as the passes have added their inputs.
            maps = [] if body is None else [(path, body.maps.get(path)) for path in self.stream.paths]
            maps += [(path, request.plan.maps.get(path)) for path in variant.skipped]
            first = fake_tensor(self.stream.sublayers[0].stream_in)
            assert first is not None
            values = [scales.get(path, 1.0) for path in self.stream.paths]
            held = [torch.tensor(values, dtype=torch.float32, device=first.device)]
            for path, one in maps:
                if one is not None:
                    stream = fake_tensor(self.stream.by_path(path).stream_in)
                    assert stream is not None
                    held += one.parts(stream.dtype, stream.device)
            known = request.stand_ins[key] = tuple(held)
        return known

    def _variant_for(self, request: Request, phase: str, tokens: int) -> Variant:
        """Return the variant that ``request`` calls for in ``phase``, for so many ``tokens`` a row."""
        skipped, prompt = request.skipped, request.plan.prompt
        paths = tuple(path for path in self.stream.paths if path in skipped)
        body = None
        if prompt is not None and phase == "prefill" and self._token_input is None:
            self.session.note("no input of the graph counts its tokens: the prompt runs in full")
        if prompt is not None and phase == "prefill" and prompt.apply_to(tokens):
            body = prompt.as_pass(self.stream.paths)
        return self._variant(paths, self._probes(request, phase, skipped), request.plan.map_forms(paths), body)

    def _variant(
        self, skipped: tuple[str, ...], probed: tuple[str, ...], maps: Maps = (), body: SkipBodyRows | None = None
    ) -> Variant:
        # While it learns, a graph runs a few dozen times: not worth an optimising compiler's time.
        lowering = _EAGER if self.session.learning else self.lowering
        key = (skipped, probed, maps, body, lowering.inner)
        variant = self._known(key)
        if variant is not None:
            return variant
        with self._making, collector_paused():
            # Another thread may have made it meanwhile.
            variant = self._known(key) or self._specialise(skipped, probed, maps, body, lowering)
        with self._lock:
            self.variants[key] = variant
            if len(self.variants) > _VARIANTS:
                self.variants.popitem(last=False)
        return variant

    def _known(self, key: tuple[object, ...]) -> Variant | None:
        """Return the variant of ``key`` where it has been made; those last used are kept."""
        with self._lock:
            if key in self.variants:
                self.variants.move_to_end(key)
            return self.variants.get(key)

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
        before = self.narrowed(body) if self.stream.phase == "prefill" and not probed else None
        gm, stream = (self._growth.gm, self._growth.stream) if before is None else (before.gm, before.stream)
        key = (lowering, body, before is not None)
        if key not in self._prepared:
            self._prepared[key] = lowering.prepare(gm, stream)
            if lowering.uncut:
                self.session.note(f"{lowering.uncut}; each skip set compiles it as a whole")
        passes = skip_passes(skipped, probed, maps)
        if self.session.options.debug_dir is not None:
            rows = row_passes(body) if before is not None else ()
            self._write_debug_folder((AppendInPlace(), *rows, *passes), skipped, probed)
        try:
            result = run_pipeline(*self._prepared[key], passes)
        except VerificationError:
            raise
        except PassError:
            # A region cannot go that still gives a skipped cache entry its shape; a part of it can.
            result = run_pipeline(gm, stream, passes)
            lowering = Lowering(lowering.inner, "whole", self.session.note)
        grown = self._growth.used(result.gm)
        run = lowering.lower(result.gm)
        if self._recorded is not None and lowering.inner == "inductor":
            run = RecordedRun(run, self._recorded, self.session.note)
        seconds = time.perf_counter() - started
        log.info(
            "%s: made the %s graph that skips %d and probes %d sublayers, in %.1f s",
            *(self.session.model_name, self.stream.phase, len(skipped), len(probed), seconds),
        )
        history = (*(() if before is None else before.history), *result.history)
        return Variant(skipped, probed, body, run, ShapeCheck(self.gm, result.gm), grown, history, seconds)

    def narrowed(self, body: SkipBodyRows | None) -> PipelineResult:
        """Return the graph of a prompt that computes the rows that are read, but for those that ``body`` skips."""
        if body not in self._narrowed:
            result = run_pipeline(self._growth.gm, self._growth.stream, row_passes(body))
            for path, operation in () if body is None else stopped_at(result.gm, result.stream, body.head + body.tail):
                self.session.note(
                    f"{path}: {operation} is not known to work row by row, so what it needs is computed of the whole prompt"
                )
            if body is not None and _gives_every_row(result):
                self.session.note(
                    "the model returns something of every token of a prompt (logits or hidden states): for its body that of a "
                    "model that skips, and so is a loss made of it (labels=); generate() reads the last token's alone"
                )
            self._narrowed[body] = result
        return self._narrowed[body]

    def _write_debug_folder(self, passes: Sequence[Pass], skipped: tuple[str, ...], probed: tuple[str, ...]) -> None:
        """Run ``passes`` on the graph as it was captured, op by op, for people to read."""
        title = f"{self.session.model_name}-{self.stream.phase}-{len(skipped)}-skipped-{len(probed)}-probed"
        run_passes(self.gm, self.stream, passes, debug_dir=self.session.options.debug_dir, title=title)

    def _finish(
        self,
        request: Request,
        phase: str,
        variant: Variant,
        inputs: Sequence[Any],
        outputs: Any,
        objects: Sequence[Any],
    ) -> Any:
        if variant.probed:
            *outputs, rows = outputs
            outputs = tuple(outputs)
            if request.learning:
                self.session.learn(rows, self.stream, self._rows_and_tokens(inputs)[1])
            else:
                request.record_window(rows, variant.probed)
        elif phase == "window":
            request.window_left = 0  # every FFN is skipped already: nothing to measure
        self._hole_memory.share(request.holes, inputs)
        cache = [outputs[position] for position in self._cache_outputs]
        for tensor in cache:
            forget_marks(tensor)
        cache.extend(inputs[index] for places in self._written.values() for index in places)
        if cache:
            self.session.requests.remember(request, cache, objects)
            length = self._growth.length_after(outputs)
            # A graph that begins a cache may hand out what it has computed as it is.
            request.length = (
                max((one.shape[-2] for one in cache if one.dim() > 1), default=0) if length is None else length
            )
        request.batch, tokens = self._rows_and_tokens(inputs)
        request.tokens[phase] += tokens
        return outputs

    def _rows_and_tokens(self, inputs: Sequence[Any]) -> tuple[int, int]:
        """Return the batch size of this call and its tokens a row, read off the input that the stream begins with."""
        if self._token_input is None:
            return 1, 0
        shape = inputs[self._token_input].shape
        return int(shape[0]), int(shape[1])


def _token_input(inputs: Sequence[fx.Node], stream: ResidualStream) -> int | None:
    """Return the position of the first input that has the batch and sequence dimensions of the stream."""
    wanted = fake_tensor(stream.sublayers[0].stream_in)
    assert wanted is not None
    for index, node in enumerate(inputs):
        value = fake_tensor(node)
        if (
            value is not None
            and value.dim() >= 2
            and list(map(str, value.shape[:2])) == list(map(str, wanted.shape[:2]))
        ):
            return index
    return None


def _gives_every_row(found: PipelineResult) -> bool:
    """Tell whether the graph returns something of every row of the stream, cache aside: logits, or the stream itself."""
    stream = fake_tensor(found.stream.sublayers[0].stream_in)
    shapes = [
        value.shape for node in output_values(found.gm) if node is not None and (value := fake_tensor(node)) is not None
    ]
    return stream is not None and any(
        len(shape) == stream.dim() and str(shape[1]) == str(stream.shape[1]) for shape in shapes
    )
