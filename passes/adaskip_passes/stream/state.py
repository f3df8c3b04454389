"""What a sublayer keeps between calls: its cache inputs, its writes to them, its cache outputs.

A region keeps state where it writes memory that outlives it, or computes a value that the graph
returns beside its result. Position counters are none of it: they do not depend on the stream, so
they lie in no region and survive a skip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from adaskip_passes.analysis.effects import Effects
from adaskip_passes.ir.graph import fake_tensor, output_values
from adaskip_passes.ir.module_paths import module_path


@dataclass(frozen=True)
class State:
    """What one region keeps; all empty for a stateless one. ``outputs`` are positions in the graph's output tuple."""

    writes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[int, ...]

    @property
    def exists(self) -> bool:
        """Whether the region keeps anything (a cache that is only read does not count)."""
        return bool(self.writes or self.outputs)


def find_state(gm: fx.GraphModule, regions: Sequence[tuple[fx.Node, ...]], effects: Effects) -> list[State]:
    """Return what each of ``regions`` keeps, in order."""
    owner = {node: index for index, region in enumerate(regions) for node in region}
    returned = tuple(output_values(gm))
    returned_roots = {effects.roots[node] for node in returned if node is not None}
    outlives = {
        write.node: write.root
        for write in effects.writes
        if write.node in owner and (_from_outside(write.root) or write.root in returned_roots)
    }
    writer = _only(outlives, owner)
    reader = _sole_readers(owner, effects)
    inputs: list[list[fx.Node]] = [[] for _ in regions]
    for node in gm.graph.find_nodes(op="placeholder"):
        for index in {found[node] for found in (writer, reader) if node in found}:
            inputs[index].append(node)
    outputs: list[list[int]] = [[] for _ in regions]
    for position, value in enumerate(returned):
        if value is not None and fake_tensor(value) is not None:
            index = owner.get(value, writer.get(effects.roots[value]))
            if index is not None:
                outputs[index].append(position)
    return [
        State(tuple(node for node in region if node in outlives), tuple(inputs[index]), tuple(outputs[index]))
        for index, region in enumerate(regions)
    ]


def _only(writes: Mapping[fx.Node, fx.Node], owner: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Map each root to the region that writes it; memory that several write, each a part of it, is none's own."""
    owners: dict[fx.Node, set[int]] = {}
    for node, root in writes.items():
        owners.setdefault(root, set()).add(owner[node])
    return {root: next(iter(found)) for root, found in owners.items() if len(found) == 1}


def _from_outside(root: fx.Node) -> bool:
    return root.op in ("placeholder", "get_attr")


def _sole_readers(owner: dict[fx.Node, int], effects: Effects) -> dict[fx.Node, int]:
    """Map each of the caller's tensors that a single region reads to that region.

    Tensors of rank 3 and more that the model does not hold: its weights, and masks that all layers
    read, are none of a region's state.
    """
    readers: dict[fx.Node, set[int]] = {}
    for node, index in owner.items():
        for source in node.all_input_nodes:
            readers.setdefault(effects.roots[source], set()).add(index)
    return {
        root: next(iter(found))
        for root, found in readers.items()
        if root.op == "placeholder" and len(found) == 1 and not module_path(root) and _may_be_cache(fake_tensor(root))
    }


def _may_be_cache(value: torch.Tensor | None) -> bool:
    return (
        value is not None
        and not isinstance(value, torch.nn.Parameter)
        and value.dim() >= 3
        and value.dtype != torch.bool
    )
