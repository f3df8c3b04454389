"""Run one captured graph for many requests: pick the variant that the request's phase calls for.

A :class:`Dispatcher` is what Dynamo calls in place of the graph that it captured. It finds the
request by its cache, asks it what to skip and what to probe, and runs the variant of the graph
specialised for that. Variants are made on first use and kept: a capture is never repeated.

Where the code that a cache comes from runs uncompiled, nothing here is called: a cache that was filled under a plan
with holes must not go on there. What comes back from there with more tokens and has holes is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaskip_compile.capture.cache_object import CachePlace, find_cache_place
from adaskip_compile.capture.dynamo import capture_reason, forget_marks
from adaskip_compile.kv_cache.appends import CacheAppends
from adaskip_compile.kv_cache.holes_seen import find_holes
from adaskip_compile.kv_cache.shared_holes import SharedHoles
from adaskip_compile.planning.replacement_values import replacement_values
from adaskip_compile.runtime.request_table import ForeignRequest
from adaskip_compile.runtime.requests import Choice, Request, RequestPhase
from adaskip_compile.runtime.session import Session
from adaskip_compile.runtime.signature import GraphSignature
from adaskip_compile.runtime.variants import Variant, VariantCache
from adaskip_passes.errors import LegalityError, PassError
from adaskip_passes.pipeline.derived_graph import DerivedGraph

log = logging.getLogger(__name__)


class Dispatcher:
    """The callable that stands for one captured graph; see the module's text.

    ``restored`` says that an earlier process captured it, and
    ``place`` where it found its cache objects; what is captured now is asked for it.
    """

    def __init__(
        self,
        session: Session,
        graph: DerivedGraph,
        *,
        restored: bool = False,
        place: CachePlace | None = None,
    ) -> None:
        graph = graph.called(f"{session.model_name}-{graph.stream.phase}")
        if session.options.passes:
            graph = graph.run(session.options.passes)
            if graph.added:
                names = ", ".join(one.name for one in graph.added)
                raise PassError(
                    f"passes= have added inputs ({names}), and nobody gives the graph more than it was captured with"
                )
        gm, stream = graph.gm, graph.stream
        self.session, self.gm, self.stream = session, gm, stream
        self.restored = restored
        self.calls = 0
        self.captured_because = None if restored else capture_reason()
        self._signature = GraphSignature.of(gm, stream)
        self._shared_holes = SharedHoles(self._signature.written)
        held = [node for sublayer in stream.sublayers for node in sublayer.cache_inputs]
        self.place = place if restored else find_cache_place(held)
        self._appends = CacheAppends(graph, session.storages)
        self.variants = VariantCache(gm, self._appends, session.options, session.model_name, session.note)
        self._stateful = frozenset(item.path for item in stream.sublayers if item.stateful)
        self._ffns = tuple(item.path for item in stream.sublayers if item.kind == "ffn" and not item.stateful)

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph on ``inputs`` as the request that they belong to calls for."""
        self.calls += 1
        reason = self.session.why_unskipped()
        if reason is not None:
            self.session.note(reason)
            self._require_no_holes(inputs, reason)
            variant = self.variants.get((), (), learning=self.session.learning)
            return variant.run(*inputs, *self._grown(variant, inputs))
        objects = self._objects()
        request = self._request(inputs, objects)
        if self.calls == 1 and not self.restored:
            request.captures.append(f"{self.stream.phase}: {self.captured_because or 'the first graph'}")
        phase = self._phase(request)
        if phase != "prefill":
            request.take_ramp_steps(self._stateful)
        tokens = self._signature.rows_and_tokens(inputs)[1]
        choice = self._choice(request, phase, tokens)
        variant = choice.variant
        if variant.body is not None:
            request.body_tokens += tokens - variant.body.head - variant.body.tail
        started = time.perf_counter()
        outputs = variant.run(*inputs, *self._grown(variant, inputs), *choice.replacements)
        request.seconds[phase] += time.perf_counter() - started
        variant.shapes.check(inputs, outputs)
        if phase == "prefill":
            self.session.prepare_decode(request)
        return self._finish(request, phase, variant, inputs, outputs, objects)

    def _require_no_holes(self, inputs: Sequence[Any], reason: str) -> None:
        """Refuse to run a request in full that has skipped: its cache lacks what the full graph would read."""
        cache = self._signature.cache(inputs)
        if cache and not self._signature.starts_over(inputs):
            owner = self.session.requests.look_up(self._objects(), cache)
            if owner is not None:
                owner.check(frozenset(), because=reason)

    def _objects(self) -> list[Any]:
        """Return the caller's objects that hold the cache of this call."""
        return [] if self.place is None else self.place.objects()

    def prepare(self, request: Request) -> None:
        """Make the variant that ``request`` will begin to decode with, so that its first token need not wait for it."""
        skipped = request.plan.scales_at(request.decoded) | request.extra
        self._variant_for(request, skipped, self._phase(request), 1)

    def _phase(self, request: Request) -> RequestPhase:
        if self.stream.phase == "prefill":
            return "prefill"
        return "window" if request.window_left else "steady"

    def _request(self, inputs: Sequence[Any], objects: Sequence[Any]) -> Request:
        """Return the request that this call belongs to, whose cache ``objects`` hold."""
        cache = self._signature.cache(inputs)
        if not cache:
            return self._start()
        length = self._appends.length(inputs)
        if length == 0 or (self.stream.phase == "prefill" and self._signature.starts_over(inputs)):
            self._shared_holes.separate(inputs)
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

    def _adopt(
        self, inputs: Sequence[Any], objects: Sequence[Any], length: int | None, foreign: ForeignRequest | None
    ) -> Request:
        """Return a request for a cache without a mark of ours: one that has moved, or one filled by someone else."""
        if foreign is not None:
            foreign.check(self._stateful.intersection(self.session.plan_for_new_request().paths))
        else:
            seen = find_holes({path: inputs[places[0]] for path, places in self._signature.cache_inputs.items()})
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

    def _probes(self, request: Request, phase: RequestPhase, skipped: Mapping[str, float]) -> tuple[str, ...]:
        if request.learning:
            return self.stream.paths if phase == "prefill" else ()
        if phase != "window":
            return ()
        return tuple(path for path in self._ffns if path not in skipped)

    def _grown(self, variant: Variant, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Return the cache entries as this call shall leave them, with room for its tokens."""
        return self._appends.entries(variant.grown, variant.skipped, inputs, *self._signature.rows_and_tokens(inputs))

    def _choice(self, request: Request, phase: RequestPhase, tokens: int) -> Choice:
        """Return what ``request`` calls for in ``phase``, for so many ``tokens`` a row.

        A decoded token finds what the one before it has found: that changes only where the request forgets it.
        """
        key = (id(self), phase, self.session.learning)
        known = request.chosen.get(key)
        if known is not None and phase != "prefill":
            return known
        request.check(frozenset(request.skipped))
        variant = self._variant_for(request, request.skipped, phase, tokens)
        if known is None or known.variant is not variant:
            known = request.chosen[key] = Choice(variant, self._replacements(request, variant))
        return known

    def _replacements(self, request: Request, variant: Variant) -> tuple[torch.Tensor, ...]:
        """Return what ``variant`` takes in place of what it skips: scales and tensors of maps."""
        scales, maps = request.skipped, request.plan.maps
        if variant.body is not None and request.plan.prompt is not None:
            scales, maps = {**scales, **request.plan.prompt.scales}, {**maps, **request.plan.prompt.maps}
        tensors = {path: one.tensors for path, one in maps.items()}
        return tuple(replacement_values(variant.given, self.stream, scales, tensors))

    def _variant_for(self, request: Request, skipped: Mapping[str, float], phase: RequestPhase, tokens: int) -> Variant:
        """Return the variant that ``request`` calls for in ``phase`` where it skips that, for so many ``tokens`` a row."""
        prompt = request.plan.prompt
        paths = tuple(path for path in self.stream.paths if path in skipped)
        body = None
        if prompt is not None and phase == "prefill" and self._signature.tokens is None:
            self.session.note("no input of the graph counts its tokens: the prompt runs in full")
        if prompt is not None and phase == "prefill" and prompt.apply_to(tokens):
            body = prompt.as_pass(self.stream.paths)
            body = body if self.variants.skips_body(body) else None
        probed, maps = self._probes(request, phase, skipped), request.plan.map_forms(paths)
        return self.variants.get(paths, probed, maps, body, learning=self.session.learning)

    def _finish(
        self,
        request: Request,
        phase: RequestPhase,
        variant: Variant,
        inputs: Sequence[Any],
        outputs: Any,
        objects: Sequence[Any],
    ) -> Any:
        if variant.probed:
            *outputs, rows = outputs
            outputs = tuple(outputs)
            if request.learning:
                self.session.learn(rows, self.stream, self._signature.rows_and_tokens(inputs)[1])
            else:
                request.record_window(rows, variant.probed)
        elif phase == "window":
            request.window_left = 0  # every FFN is skipped already: nothing to measure
            request.chosen.clear()
        self._shared_holes.share(request.holes, inputs)
        for position in self._signature.cache_outputs:
            forget_marks(outputs[position])
        cache = self._signature.cache_after(inputs, outputs)
        if cache:
            self.session.requests.remember(request, cache, objects)
            length = self._appends.length_after(outputs)
            # A graph that begins a cache may hand out what it has computed as it is.
            request.length = (
                max((one.shape[-2] for one in cache if one.dim() > 1), default=0) if length is None else length
            )
        request.batch, tokens = self._signature.rows_and_tokens(inputs)
        request.tokens[phase] += tokens
        return outputs
