"""What every value of a graph depends on, through tensors and through memory.

Only edges that carry the values of tensors count: a position read off ``x.size()`` does not depend on
``x``, and a number read by ``x.item()`` does. A reader depends on the earlier writes to the memory
that it reads. Sets of nodes are Python integers used as bit sets, so that graphs of hundreds of
layers stay cheap.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from adaskip_passes.analysis.effects import Effects
from adaskip_passes.ir.graph import fake_value, op_name

# Their result has the shape or dtype of a tensor, and nothing of its values.
SHAPE_ONLY = frozenset(
    "new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like rand_like size numel dim".split()
)

# Of their second argument they read the shape or the dtype alone.
_LIKE_ANOTHER = frozenset({"expand_as", "reshape_as", "type_as", "view_as"})


# They make a number of what a tensor holds.
_READ_OUT = frozenset({"item", "tolist", "_local_scalar_dense", "__float__", "__int__", "__bool__"})


class Dependence:
    """For each node of a graph, the set of nodes that its value depends on."""

    def __init__(self, gm: fx.GraphModule, effects: Effects) -> None:
        self.effects = effects
        self.position = {node: index for index, node in enumerate(gm.graph.nodes)}
        self._nodes = list(self.position)
        self._writers = effects.writers()
        self._ancestors: list[int] = []
        self._read_out: set[fx.Node] = set()
        written: dict[fx.Node, int] = {}
        writes = effects.written()
        for node in self._nodes:
            if self._is_read_out(node):
                self._read_out.add(node)
            bits = self._inherited(node, effects, written)
            self._ancestors.append(bits)
            for root in writes.get(node, ()):
                written[root] = written.get(root, 0) | bits | (1 << self.position[node])

    def _is_read_out(self, node: fx.Node) -> bool:
        """Tell whether ``node`` is a number that a tensor holds, or made of one."""
        if carries_tensor(fake_value(node)):
            return False
        return op_name(node) in _READ_OUT or not self._read_out.isdisjoint(node.all_input_nodes)

    def _inherited(self, node: fx.Node, effects: Effects, written: dict[fx.Node, int]) -> int:
        if op_name(node) in SHAPE_ONLY:
            return 0
        bits = 0
        for source in node.all_input_nodes[:1] if op_name(node) in _LIKE_ANOTHER else node.all_input_nodes:
            if source in self._read_out or carries_tensor(fake_value(source)):
                bits |= self.with_self(source) | written.get(effects.roots[source], 0)
        return bits

    def with_self(self, node: fx.Node) -> int:
        """Return the bit set of ``node`` and all that it depends on."""
        index = self.position[node]
        return self._ancestors[index] | (1 << index)

    def written_since(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """Return the writes to the memory of ``node`` whose outcome ``reader`` depends on, in graph order."""
        writers = self._writers.get(self.effects.roots[node], ())
        return [writer for writer in writers if self.depends(reader, writer)]

    def as_read(self, node: fx.Node, reader: fx.Node) -> int:
        """Return the bit set of ``node`` and all that what ``reader`` finds there depends on.

        After ``y.copy_(z)`` a reader of ``y`` finds what z is.
        """
        bits = self.with_self(node)
        for writer in self.written_since(node, reader):
            bits |= self.with_self(writer)
        return bits

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Tell whether the value of ``node`` depends on that of ``on`` (a node does not depend on itself)."""
        return bool(self._ancestors[self.position[node]] >> self.position[on] & 1)

    def reaches(self, source: fx.Node, node: fx.Node) -> bool:
        """Tell whether ``node`` is ``source`` or depends on it."""
        return node is source or self.depends(node, source)

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """Return the bit set of ``nodes``."""
        found = bytearray(len(self._nodes) // 8 + 1)
        for node in nodes:
            index = self.position[node]
            found[index >> 3] |= 1 << (index & 7)
        return int.from_bytes(found, "little")

    def any_between(self, source: fx.Node, sink: fx.Node, among: int) -> bool:
        """Tell whether a node of the bit set ``among`` depends on ``source`` and is or feeds ``sink``."""
        between = self.with_self(sink) & among & ~self.with_self(source)
        while between:
            index = between.bit_length() - 1
            if index < self.position[source]:
                return False
            if self.depends(self._nodes[index], source):
                return True
            between ^= 1 << index
        return False

    def last_before(self, node: fx.Node, among: int) -> fx.Node | None:
        """Return the last node of the bit set ``among`` that ``node`` depends on, or None."""
        found = self._ancestors[self.position[node]] & among
        return self._nodes[found.bit_length() - 1] if found else None


def carries_tensor(value: object) -> bool:
    """Tell whether a fake value is a tensor or a container that holds one."""
    if isinstance(value, (tuple, list)):
        return any(carries_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)
