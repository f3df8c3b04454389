"""Memory for a KV cache that grows: room to spare behind the tokens, so that a step appends in place.

A cache entry is a view of the first tokens of a storage. A step that extends it gets a longer view of the
same storage, and writes the new tokens behind the old ones. Only the longest view may be extended so: behind a
shorter one (a cropped cache, an older reference, the other end of a fork) stand tokens that someone else may
still read, so it is copied to a storage of its own. Tokens that have been written are never written again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from adaskip_passes.specialise.append_in_place import token_major

# A copy moves all tokens, and makes room for a sixteenth more: over time a step copies no more than 16 tokens
# beside its own, and no more than a sixteenth of the memory lies idle.
_SHARE, _LEAST = 16, 64
# Records of storages that are gone are dropped when there are so many in all, and twice as many as at the last time.
_MANY = 1024


@dataclass
class _Growing:
    """What is known of one storage: the longest view of it that was handed out, and for how many tokens it has room."""

    storage: StorageWeakRef
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    room: int


class GrowingStorages:
    """The storages of the growing caches of one compiled model. Safe under threads.

    Cache entries are ``(batch, heads, tokens, head_dim)``, the tokens outermost in memory. They come detached:
    of a view Dynamo asks what it is a view of, and would capture another graph where that has another size.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A storage that is gone keeps its address as long as it is referred to here: no other is taken for it.
        self._known: dict[int, _Growing] = {}
        self._many = _MANY

    def extended(self, entries: Sequence[torch.Tensor], tokens: int) -> list[torch.Tensor]:
        """Return each of ``entries`` with ``tokens`` more tokens, whose content is left open.

        In place where there is room behind the entry, else as a copy in a new storage.
        """
        with self._lock:
            return [self._extended(entry, tokens) for entry in entries]

    def begun(self, shapes: Sequence[torch.Size], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return an entry of each of ``shapes`` in a new storage, with open content, dtype and device as ``like`` has them."""
        with self._lock:
            self._drop_expired()
            return [self._begun(shape, one) for shape, one in zip(shapes, like, strict=True)]

    def _extended(self, entry: torch.Tensor, tokens: int) -> torch.Tensor:
        *outer, length, width = entry.shape
        shape = torch.Size((*outer, length + tokens, width))
        known = self._known.get(entry.untyped_storage()._cdata)
        if known is not None and shape[-2] <= known.room and _is_longest(entry, known):
            known.shape = shape
            return entry.as_strided(shape, known.strides).detach()
        longer = self._begun(shape, entry)
        longer.narrow(-2, 0, length).copy_(entry)
        return longer

    def _begun(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        *outer, length, width = shape
        room = length + max(length // _SHARE, _LEAST)
        strides = token_major(shape)
        # Tensors made in inference mode could not be written outside of it, where a request may go on.
        with torch.inference_mode(False):
            whole = torch.empty_strided((*outer, room, width), strides, dtype=like.dtype, device=like.device)
        storage = whole.untyped_storage()
        self._known[storage._cdata] = _Growing(StorageWeakRef(storage), shape, strides, like.dtype, room)
        if len(self._known) > self._many:
            self._drop_expired()
            self._many = max(_MANY, 2 * len(self._known))
        return whole.narrow(-2, 0, length).detach()

    def _drop_expired(self) -> None:
        """Forget the storages that are gone.

        What is left of one is a small piece of memory. It lies beside where the entry was, and keeps an allocator from
        joining what came free: the caches of the next requests would each need new memory.
        """
        self._known = {key: known for key, known in self._known.items() if not known.storage.expired()}


def _is_longest(entry: torch.Tensor, known: _Growing) -> bool:
    """Tell whether ``entry`` is all that is in use of its storage, so that nothing stands behind it."""
    return (
        entry.shape == known.shape
        and entry.stride() == known.strides
        and entry.storage_offset() == 0
        and entry.dtype is known.dtype
    )
