"""The memory of a preallocated cache: what skipped sublayers would have written is never read, and needs none of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class SharedHoles:
    """Has the preallocated entries of a request's holes share memory, for one captured graph.

    ``written`` are the positions, among the inputs of the graph, of the entries that each sublayer writes in place.
    """

    def __init__(self, written: dict[str, tuple[int, ...]]) -> None:
        self._written = written

    def separate(self, inputs: Sequence[Any]) -> None:
        """Give each entry memory of its own again, where an earlier request had its holes share some."""
        seen: set[int] = set()
        for places in self._written.values():
            for index in places:
                tensor = inputs[index]
                key = tensor.untyped_storage()._cdata
                if key in seen:
                    tensor.set_(torch.zeros_like(tensor))
                seen.add(tensor.untyped_storage()._cdata)

    def share(self, holes: frozenset[str], inputs: Sequence[Any]) -> None:
        """Let each entry of ``holes`` share the memory of a kept sublayer's that is laid out alike."""
        donors = {
            _layout(slot, inputs[index]): inputs[index]
            for path, places in reversed(self._written.items())
            if path not in holes
            for slot, index in enumerate(places)
        }
        for path in self._written.keys() & holes:
            for slot, index in enumerate(self._written[path]):
                hole = inputs[index]
                donor = donors.get(_layout(slot, hole))
                if donor is not None and donor.untyped_storage()._cdata != hole.untyped_storage()._cdata:
                    hole.set_(donor.detach())


def _layout(slot: int, tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two entries must agree in for one's memory to stand for the other's; ``slot`` tells keys from values."""
    return (slot, tensor.dtype, tensor.device, tensor.shape, tensor.stride())
