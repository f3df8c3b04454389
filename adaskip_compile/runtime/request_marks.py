"""Marks: what a cache carries to say which request it belongs to.

A mark is a plain attribute of the caller's cache object, or of its tensors where there is no object. It stays through
whatever the cache does to itself, and goes with it: a deep copy of a cache has a mark of its own, with a copy of the
request at the same place. A mark is pickled as plain data, so that a file or another process can hold the cache where
this package is not installed, and a tensor that carries one is still loaded with ``weights_only``.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adaskip_compile.runtime.requests import Request

ATTRIBUTE = "_adaskip_request"
# A mark as it comes back from a pickle: texts, and the paths of the holes.
Pickled = Mapping[str, Any]


class RequestMark:
    """Says that a cache belongs to ``request``, which ``table`` lists.

    ``is_copy`` is true of the mark of a copied cache until that is first used: its request is then a snapshot of the
    original's, which no table lists yet.
    """

    __slots__ = ("__weakref__", "_on", "is_copy", "request", "table")

    def __init__(self, request: Request, table: weakref.ref[Any], *, is_copy: bool = False) -> None:
        self.request, self.table, self.is_copy = request, table, is_copy
        self._on: dict[int, weakref.ref[Any]] = {}

    def put_on(self, holder: Any) -> None:
        """Let ``holder`` carry this mark; an object that does so is its owner."""
        attributes = holder.__dict__  # not by assignment, which a frozen or a checked class may refuse
        if attributes.get(ATTRIBUTE) is not self or not self._owned_by(holder):
            attributes[ATTRIBUTE] = self
            self._on[id(holder)] = _reference(holder)

    def tag(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let ``tensors`` carry this mark; they do not own it."""
        for tensor in tensors:
            tensor.__dict__[ATTRIBUTE] = self

    def is_free_for(self, objects: Iterable[Any]) -> bool:
        """Tell whether ``objects`` own this mark, or nobody does: else they have it, or their memory, from its owner."""
        if any(self._owned_by(one) for one in objects):
            return True
        return all(reference() is None for reference in self._on.values())

    def _owned_by(self, holder: Any) -> bool:
        reference = self._on.get(id(holder))
        return reference is not None and reference() is holder

    def __deepcopy__(self, memo: dict[int, Any]) -> RequestMark:
        return self.__copy__()

    def __copy__(self) -> RequestMark:
        return RequestMark(self.request.copied(), self.table, is_copy=True)

    def __reduce__(self) -> tuple[Any, ...]:
        table = self.table()
        kept = "" if table is None else table.keep_snapshot(self.request)
        fields = [("process", str(os.getpid())), ("snapshot", kept), ("holes", sorted(self.request.holes))]
        return OrderedDict, (fields,)


def marks_on(holders: Iterable[Any]) -> list[RequestMark | Pickled]:
    """Return the marks that ``holders`` carry, each once."""
    found: dict[int, Any] = {}
    for holder in holders:
        mark = holder.__dict__.get(ATTRIBUTE)
        if mark is not None:
            found[id(mark)] = mark
    return list(found.values())


def _reference(holder: Any) -> weakref.ref[Any]:
    try:
        return weakref.ref(holder)
    except TypeError:  # no weak references to it: as good as gone
        return weakref.ref(_Gone())


class _Gone:
    """What no longer is there."""
