"""Requests: who a call belongs to, and what that request has skipped so far.

A request is identified by its KV cache. Between two calls the memory of the cache is the only thing
that both share, so a table maps storages to requests; a crop leaves the storage as it is. Where a
cache comes back in other memory (beam reordering, batch selection, a copy), its content tells which
attentions have no keys of their own: their entries are views of a kept layer's, so they equal it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from adaskip_compile.online_choice import extra_sublayers
from adaskip_compile.plans import RampStep, SkipPlan
from adaskip_passes.errors import LegalityError


@dataclass(eq=False)
class Request:
    """One request: its plan, what it skips now, and how far it has come.

    ``holes`` are the stateful sublayers that have no state in its cache; none of them may run again.
    ``scales`` maps each path that the plan skips by now to its scale, ``extra`` those that the window added.
    ``ramp`` are the steps of the plan's ramp that are still to come. ``captures`` says which graphs had to be
    captured for it, and why.
    """

    number: int
    plan: SkipPlan
    scales: dict[str, float]
    holes: frozenset[str]
    learning: bool = False
    extra: dict[str, float] = field(default_factory=dict)
    window_left: int = 0
    window_rows: list[torch.Tensor] = field(default_factory=list)
    window_paths: tuple[str, ...] = ()
    tokens: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "window": 0, "steady": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "window": 0.0, "steady": 0.0})
    batch: int = 1
    kv_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    captures: list[str] = field(default_factory=list)
    storages: list[StorageWeakRef] = field(default_factory=list)
    length: int = 0
    stand_ins: dict[tuple[str, ...], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    ramp: tuple[RampStep, ...] = ()

    @property
    def skipped(self) -> dict[str, float]:
        """Every path skipped now, and its scale."""
        return {**self.scales, **self.extra}

    @property
    def expired(self) -> bool:
        """Whether all memory of its cache is gone: it has ended, or its cache has moved."""
        return all(storage.expired() for storage in self.storages)

    def check(self, skipped: frozenset[str], *, because: str = "") -> None:
        """Raise :class:`LegalityError` if running all but ``skipped`` would run a stateful sublayer that has a hole."""
        back = sorted(self.holes - skipped)
        if back:
            raise LegalityError(
                f"request {self.number}: {', '.join(back)} was skipped earlier in this request and has no cache entries "
                "for those tokens, so it cannot run again; keep it skipped, or start a new request with a new cache"
                + (f" ({because})" if because else "")
            )

    @property
    def decoded(self) -> int:
        """How many tokens a row went through decode so far."""
        return self.tokens["window"] + self.tokens["steady"]

    def take_ramp_steps(self, stateful: frozenset[str]) -> None:
        """Skip and resume from the next decoded token on what the ramp says; ``stateful`` are all such sublayers.

        A stateful sublayer that is dropped is a hole from then on: :meth:`check` refuses to run it again.
        """
        while self.ramp and self.ramp[0].after <= self.decoded:
            step, *later = self.ramp
            for path in step.resumed:
                self.scales.pop(path)
            for sublayer in step.skipped:
                self.scales[sublayer.path] = sublayer.scale
                # The plan decides on it from now on, not the window.
                self.extra.pop(sublayer.path, None)
            self.holes |= frozenset(sublayer.path for sublayer in step.skipped) & stateful
            self.ramp = tuple(later)
            self.stand_ins.clear()

    def record_window(self, rows: torch.Tensor, paths: tuple[str, ...]) -> None:
        """Take the statistics of one decoded token, ``f32[len(paths), 3]``; after the last one, choose the extra FFNs."""
        if paths != self.window_paths and self.window_rows:
            # The ramp took a sublayer away, or gave one back: what was measured in all of the window counts.
            common = tuple(path for path in paths if path in self.window_paths)
            self.window_rows = [_rows_of(kept, self.window_paths, common) for kept in self.window_rows]
            rows, paths = _rows_of(rows, paths, common), common
        self.window_paths = paths
        self.window_rows.append(rows)
        self.window_left -= 1
        if self.window_left == 0:
            self.close_window()

    def close_window(self) -> None:
        """Choose the extra sublayers from what the window measured (one read-back for the whole window)."""
        means = torch.stack(self.window_rows).double().mean(0).tolist()
        self.window_rows.clear()
        column = 1 if self.plan.scale_kind == "token" else 2
        measured = {path: (row[0], row[column]) for path, row in zip(self.window_paths, means, strict=True)}
        self.extra = extra_sublayers(self.plan, measured, stateful=self.holes)
        self.stand_ins.clear()


class RequestTable:
    """The live requests of one compiled model, found by the memory of their caches. Safe under threads."""

    def __init__(self, history: int = 1000) -> None:
        self._lock = threading.Lock()
        self._by_storage: dict[int, tuple[StorageWeakRef, Request]] = {}
        self._count = 0
        self._last = threading.local()
        self.history: deque[Request] = deque(maxlen=history)

    def start(
        self, plan: SkipPlan, *, scales: dict[str, float], holes: frozenset[str], learning: bool = False
    ) -> Request:
        """Return a new request under ``plan``."""
        with self._lock:
            self._count += 1
            request = Request(
                self._count, plan, dict(scales), holes, learning, window_left=_window(plan), ramp=plan.ramp
            )
            self.history.append(request)
            self._drop_expired()
            return request

    def find(self, cache: Sequence[torch.Tensor]) -> Request | None:
        """Return the request that owns the memory of ``cache``, or None."""
        with self._lock:
            for tensor in cache:
                known = self._by_storage.get(tensor.untyped_storage()._cdata)
                if known is not None and not known[0].expired():
                    return known[1]
        return None

    def remember(self, request: Request, cache: Sequence[torch.Tensor]) -> None:
        """Let the memory of ``cache`` stand for ``request`` from now on."""
        storages = {}
        for tensor in cache:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        references = {key: StorageWeakRef(storage) for key, storage in storages.items()}
        request.kv_bytes = sum(storage.nbytes() for storage in storages.values())
        request.storages = list(references.values())
        self._last.request = request
        with self._lock:
            for key, reference in references.items():
                self._by_storage[key] = (reference, request)
            if len(self._by_storage) > 4096:
                self._drop_expired()

    def moved(self, groups: Sequence[frozenset[str]], length: int | None) -> Request | None:
        """Return the request whose cache came back in other memory, or None where it is no request of ours.

        ``groups`` are the sublayers with equal cache entries: all but one in each are holes. ``length``
        is the number of tokens in the cache, None where that is not known. A request whose old memory is
        gone has moved; one whose memory still lives was copied, and so is the request.
        :class:`LegalityError` where there are holes that fit no request: which member of a group is the
        real one is then not to be told.
        """
        with self._lock:
            fitting = [request for request in self.history if _fits(request, groups)]
        if groups and not fitting:
            raise LegalityError(
                f"this cache has no entries of its own for some of {', '.join(sorted(set().union(*groups)))}, and no "
                "request of this model left it so; start a new request with an empty cache"
            )
        last = getattr(self._last, "request", None)
        if last in fitting and last.length == length and last.expired:
            return last
        if not groups:
            return None
        same = [request for request in fitting if request.length == length] or fitting
        gone = [request for request in same if request.expired]
        if len(gone) == 1:
            return gone[0]
        return self._copy((gone or same)[-1], certain=len(same) == 1)

    def _copy(self, request: Request, *, certain: bool) -> Request:
        """Copy a request; where it is not certain which one it was, its window begins again (always right, maybe slower)."""
        with self._lock:
            self._count += 1
            copied = replace(
                request,
                number=self._count,
                scales=dict(request.scales),
                extra=dict(request.extra),
                window_rows=list(request.window_rows),
                tokens=dict(request.tokens),
                seconds=dict(request.seconds),
                notes=[*request.notes, f"copied from request {request.number}"],
                captures=[],
                stand_ins={},
            )
            if not certain:
                copied.extra = {}
                copied.window_rows = []
                copied.window_left = _window(request.plan)
                copied.notes.append("several requests fit this cache: the window began again")
            self.history.append(copied)
            return copied

    def _drop_expired(self) -> None:
        self._by_storage = {key: entry for key, entry in self._by_storage.items() if not entry[0].expired()}
        for past in self.history:
            if past.stand_ins and past.storages and past.expired:
                past.stand_ins = {}  # made again, should its cache come back in other memory


def _rows_of(rows: torch.Tensor, paths: tuple[str, ...], wanted: tuple[str, ...]) -> torch.Tensor:
    """Return the rows of ``wanted`` among those of ``paths``."""
    return rows[[paths.index(path) for path in wanted]]


def _window(plan: SkipPlan) -> int:
    """Return for how many tokens to probe; without a threshold there is nothing to choose."""
    return plan.window if plan.beta is not None else 0


def _fits(request: Request, groups: Sequence[frozenset[str]]) -> bool:
    if not request.storages:
        return False
    members = frozenset().union(*groups)
    return request.holes <= members and all(len(group - request.holes) == 1 for group in groups)


def equal_groups(entries: dict[str, torch.Tensor]) -> list[frozenset[str]]:
    """Return the groups of two and more paths whose cache entries hold the same first token.

    ``entries`` maps a stateful sublayer to one tensor of its cache, ``(batch, ..., tokens, width)``.
    Keys of different layers never agree to the last bit; entries that are all zero hold nothing yet.
    """
    found: dict[tuple[object, ...], set[str]] = {}
    for path, tensor in entries.items():
        if tensor.numel() == 0:
            continue
        sample = tensor.select(-2, 0).flatten().tolist()
        if any(sample):
            found.setdefault((tuple(tensor.shape), *sample), set()).add(path)
    return [frozenset(paths) for paths in found.values() if len(paths) > 1]
