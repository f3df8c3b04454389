"""What a captured graph appends to its cache: the graph that appends in place, and the memory that it needs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_compile.kv_cache.growing_storage import GrowingStorages
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from adaskip_passes.pipelines import GROW
from adaskip_passes.specialise.append_in_place import GROWN, find_appends


@dataclass(frozen=True)
class _Entry:
    """One cache entry of the sublayer ``path`` that grows.

    ``past`` is the position of the input that it extends, None where it begins; ``position`` that of the output, and
    ``grown`` its fake value.
    """

    path: str
    past: int | None
    position: int
    grown: torch.Tensor


class CacheAppends:
    """Makes the inputs of one captured graph in which its cache grows.

    ``graph`` appends in place and does nothing twice. A variant of it takes the captured inputs, then those of
    :meth:`entries`, then what other passes have added.
    """

    def __init__(self, graph: DerivedGraph, storages: GrowingStorages) -> None:
        self._storages = storages
        place = {node: index for index, node in enumerate(graph.gm.graph.find_nodes(op="placeholder"))}
        appends = find_appends(graph.gm, graph.stream)
        self._entries = [
            _Entry(one.path, None if one.past is None else place[one.past], one.position, one.grown) for one in appends
        ]
        # One for each length that entries have: a symbol stands for all that are equal.
        self._lengths = list({str(entry.grown.shape[-2]): entry for entry in self._entries}.values())
        self.graph = graph.run(GROW)

    @property
    def grows(self) -> bool:
        """Whether any entry grows."""
        return bool(self._entries)

    def length(self, inputs: Sequence[Any]) -> int | None:
        """Return the number of tokens in the longest entry of ``inputs`` that grows, None where none is given."""
        lengths = [inputs[entry.past].shape[-2] for entry in self._lengths if entry.past is not None]
        return max(lengths, default=None)

    def length_after(self, outputs: Sequence[Any]) -> int | None:
        """Return the number of tokens in the longest entry of ``outputs`` that grows, None where none is known to."""
        return max((outputs[entry.position].shape[-2] for entry in self._lengths), default=None)

    def used(self, variant: DerivedGraph) -> tuple[bool, ...]:
        """Tell for each entry whether ``variant`` still has a use for it: a skipped attention has none."""
        inputs = {node.name: node for node in variant.gm.graph.find_nodes(op="placeholder")}
        return tuple(bool(inputs[one.name].users) for one in variant.added if one.part == GROWN)

    def entries(
        self, used: Sequence[bool], skipped: Sequence[str], inputs: Sequence[Any], batch: int, tokens: int
    ) -> list[torch.Tensor]:
        """Return the grown entries for one call on ``inputs`` of ``batch`` rows with ``tokens`` tokens each.

        Those without a use get no memory: another one stands in. What a sublayer in ``skipped`` does not write is
        zero, where its entry alone can give all skipped ones of its kind their shape.
        """
        wanted = [entry for entry, one in zip(self._entries, used, strict=True) if one]
        pasts = [inputs[entry.past] for entry in wanted if entry.past is not None]
        fresh = [entry.grown for entry in wanted if entry.past is None]
        extended = iter(self._storages.extended(pasts, tokens))
        begun = iter(self._storages.begun([_shape(grown, batch, tokens) for grown in fresh], fresh))
        made = [next(begun if entry.past is None else extended) for entry in wanted]
        for entry, memory in zip(wanted, made, strict=True):
            if entry.path in skipped:
                memory.narrow(-2, memory.shape[-2] - tokens, tokens).zero_()
        rest = iter(made)
        found = [next(rest) if one else None for one in used]
        spare = next((entry for entry in found if entry is not None), None)
        return [spare if entry is None else entry for entry in found]  # type: ignore[misc]


def _shape(grown: torch.Tensor, batch: int, tokens: int) -> torch.Size:
    *outer, _, width = grown.shape
    return torch.Size([*(size if isinstance(size, int) else batch for size in outer), tokens, width])
