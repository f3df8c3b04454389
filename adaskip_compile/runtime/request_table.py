"""The live requests of one compiled model, and whose a cache is.

The cache object of a request carries its mark, and that is looked at alone where there is one. Else the tensors may
carry one: those of a cache that the model itself made, and those of a cache that is no object. Else the memory tells,
which a crop leaves as it is. Content is looked at last, and only to refuse what more than one request could have left.
"""

from __future__ import annotations

import itertools
import os
import threading
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from adaskip_compile.kv_cache.holes_seen import HolesSeen
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.request_marks import Pickled, RequestMark, marks_on
from adaskip_compile.runtime.requests import Request, window_of
from adaskip_passes.errors import LegalityError

_SNAPSHOTS = 256  # of pickled caches, so many can come back


@dataclass(frozen=True)
class ForeignRequest:
    """A request that another compilation, another model or another process began: what its cache lacks."""

    holes: frozenset[str]
    same_model: bool

    def check(self, skipped: frozenset[str], *, because: str = "") -> None:
        """Raise :class:`LegalityError` if running all but ``skipped`` would read what the cache lacks."""
        back = sorted(self.holes - skipped if self.same_model else self.holes)
        if back:
            whose = "another compilation of this model" if self.same_model else "another model"
            raise LegalityError(
                f"this cache has no entries for {', '.join(back)}: {whose} filled it and skipped that, so it cannot run "
                "here; keep it skipped, or start a new request with an empty cache"
                + (f" ({because})" if because else "")
            )


class RequestTable:
    """The requests of one compiled ``model``, found by their caches. Safe under threads."""

    def __init__(self, model: nn.Module | None = None, history: int = 1000) -> None:
        self._lock = threading.RLock()
        self._model = None if model is None else weakref.ref(model)
        self._self: weakref.ref[Any] = weakref.ref(self)
        self._by_storage: dict[int, tuple[StorageWeakRef, Request]] = {}
        self._snapshots: OrderedDict[str, Request] = OrderedDict()
        self._name = uuid.uuid4().hex
        self._numbers, self._pickles = itertools.count(1), itertools.count(1)
        self._last = threading.local()
        self.history: deque[Request] = deque(maxlen=history)

    def start(
        self, plan: SkipPlan, *, scales: dict[str, float], holes: frozenset[str], learning: bool = False
    ) -> Request:
        """Return a new request under ``plan``."""
        request = Request(0, plan, dict(scales), holes, learning, window_left=window_of(plan), ramp=plan.ramp)
        return self._listed(request)

    def look_up(self, objects: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Request | ForeignRequest | None:
        """Return whose the cache is that ``objects`` and ``tensors`` hold, and leave everything as it is."""
        marks = marks_on(objects) or marks_on(tensors)
        if not marks:
            return self._by_memory(tensors)
        owners = [self._owner(mark) for mark in marks]
        return max(owners, key=lambda owner: len(owner.holes))

    def find(
        self, objects: Sequence[Any], tensors: Sequence[torch.Tensor], length: int | None
    ) -> Request | ForeignRequest | None:
        """Return the request that goes on with the cache that ``objects`` and ``tensors`` hold, None where none is known.

        ``length`` is the number of tokens in it, None where that is not known. A copy is a request of its own from
        its first call on.

        Raises:
            LegalityError: It belongs to several requests that would go on in different ways.
        """
        marks = marks_on(objects) or marks_on(tensors)
        if len(marks) == 1:
            return self._resolved(marks[0], objects, length)
        if not marks:
            request = self._by_memory(tensors)
            mark = None if request is None or request.mark is None else request.mark()
            return request if mark is None else self._resolved(mark, objects, length)
        first, *others = [self._resolved(mark, objects, length) for mark in marks]
        for other in others:
            both = isinstance(first, Request) and isinstance(other, Request)
            if not (first.goes_on_like(other) if both else first == other):  # type: ignore[union-attr, arg-type]
                raise LegalityError(
                    "this cache is put together from several requests that are under different plans, or at different "
                    "places of one; go on with the cache of one request"
                )
        return first

    def remember(self, request: Request, tensors: Sequence[torch.Tensor], objects: Sequence[Any]) -> None:
        """Let ``objects``, or ``tensors`` where there are none, and their memory stand for ``request`` from now on."""
        mark = None if request.mark is None else request.mark()
        if mark is None:
            mark = RequestMark(request, self._self)
            request.mark = weakref.ref(mark)
        if objects:
            for one in objects:
                mark.put_on(one)
        else:
            mark.tag(tensors)
        self._last.request = request
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        if storages.keys() != request.storages.keys():
            request.storages = {key: StorageWeakRef(storage) for key, storage in storages.items()}
            request.kv_bytes = sum(storage.nbytes() for storage in storages.values())
            with self._lock:
                self._by_storage.update((key, (reference, request)) for key, reference in request.storages.items())
                if len(self._by_storage) > 4096:
                    self._drop_expired()

    def matching(self, seen: HolesSeen, length: int | None, *, in_object: bool) -> Request | None:
        """Return the request whose cache came back in other memory and without a mark, None where it is none of ours.

        ``in_object`` says that an object holds the cache: such a one would carry its mark if it had merely moved.

        Raises:
            LegalityError: There are holes that fit no request, or several that would go on in different ways.
        """
        last = getattr(self._last, "request", None)
        with self._lock:
            fitting = [request for request in self.history if request.storages and seen.fits(request.holes)]
        if seen and not fitting:
            raise LegalityError(
                f"this cache has no entries of its own for some of {', '.join(sorted(seen.paths))}, and no "
                "request of this model left it so; start a new request with an empty cache"
            )
        if not seen:
            # It may as well be somebody else's, unless it is what this thread has just had.
            moved = last is not None and last in fitting and last.length == length and last.ended
            return last if moved and not in_object else None
        fitting = [request for request in fitting if request.length == length] or fitting
        if not all(request.goes_on_like(fitting[0]) for request in fitting):
            numbers = ", ".join(str(request.number) for request in fitting)
            raise LegalityError(
                f"this cache was copied without the object that held it, and any of the requests {numbers} could have "
                "left it so, under different plans or at different places of one; copy the cache object as a whole, "
                "or start a new request with an empty cache"
            )
        if last in fitting and last is not None and last.ended:
            return last
        return self._listed(fitting[-1].copied())

    def keep_snapshot(self, request: Request) -> str:
        """Keep ``request`` at its place for a pickle of its cache; return the name under which that finds it again."""
        with self._lock:
            name = f"{self._name}/{next(self._pickles)}"
            self._snapshots[name] = request.copied()
            if len(self._snapshots) > _SNAPSHOTS:
                self._snapshots.popitem(last=False)
        return name

    def _resolved(
        self, mark: RequestMark | Pickled, objects: Sequence[Any], length: int | None
    ) -> Request | ForeignRequest:
        """Return the request that goes on with what carries ``mark``."""
        request = self._owner(mark)
        if not isinstance(request, Request):
            return request
        if not isinstance(mark, RequestMark):
            return self._listed(request.copied())
        with self._lock:
            if mark.is_copy:
                mark.is_copy, request.mark = False, weakref.ref(mark)
                self._listed(request)
        if mark.is_free_for(objects):
            return request
        if not request.placeless and length != request.length:
            raise LegalityError(
                f"this cache shares what another one holds, and request {request.number} has gone on in that since: "
                "which place of its plan this one is at is not to be told; copy a cache with copy.deepcopy"
            )
        return self._listed(request.copied())

    def _owner(self, mark: RequestMark | Pickled) -> Request | ForeignRequest:
        """Return the request that ``mark`` names, one that is pickled as it was kept, and what is known of one elsewhere."""
        if isinstance(mark, RequestMark):
            if mark.table() is self:
                return mark.request
            return ForeignRequest(mark.request.holes, self._is_of_same_model(mark.table()))
        here = mark["process"] == str(os.getpid())
        with self._lock:
            kept = self._snapshots.get(mark["snapshot"]) if here else None
        if kept is None and here and mark["snapshot"].startswith(self._name):
            raise LegalityError(
                f"this cache was pickled too long ago: the last {_SNAPSHOTS} that were pickled can go on; start a new "
                "request with an empty cache"
            )
        return ForeignRequest(frozenset(mark["holes"]), same_model=True) if kept is None else kept

    def _is_of_same_model(self, other: Any) -> bool:
        if self._model is None or other is None or other._model is None:
            return False
        return self._model() is not None and self._model() is other._model()

    def _by_memory(self, tensors: Sequence[torch.Tensor]) -> Request | None:
        with self._lock:
            for tensor in tensors:
                if tensor.layout != torch.strided:  # sparse ones and oneDNN's own have no memory to be known by
                    continue
                known = self._by_storage.get(tensor.untyped_storage()._cdata)
                if known is not None and not known[0].expired():
                    return known[1]
        return None

    def _listed(self, request: Request) -> Request:
        """Give ``request`` a number, and let the history list it."""
        with self._lock:
            request.number = next(self._numbers)
            self.history.append(request)
            self._drop_expired()
        return request

    def _drop_expired(self) -> None:
        self._by_storage = {key: entry for key, entry in self._by_storage.items() if not entry[0].expired()}
        for past in self.history:
            if past.chosen and past.storages and past.ended:
                past.chosen = {}  # made again, should its cache come back in other memory
