"""What the content of a cache tells of its holes, where no object says whose it is.

The entry of a skipped attention is a view of a kept one's, or zeros where none is alike. Keys that two layers
computed never agree in all tokens to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HolesSeen:
    """Holes as content shows them: of each group with equal entries all but one are, and all of ``empty``."""

    groups: tuple[frozenset[str], ...] = ()
    empty: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.groups or self.empty)

    @property
    def paths(self) -> frozenset[str]:
        """All that may be a hole."""
        return self.empty.union(*self.groups)

    def fits(self, holes: frozenset[str]) -> bool:
        """Tell whether a cache with ``holes`` looks like this."""
        return holes <= self.paths and self.empty <= holes and all(len(group - holes) == 1 for group in self.groups)


def find_holes(entries: Mapping[str, torch.Tensor]) -> HolesSeen:
    """Return what ``entries`` show: of each stateful sublayer one tensor of its cache, ``(batch, ..., tokens, width)``."""
    filled = {path: tensor for path, tensor in entries.items() if tensor.numel()}
    empty = frozenset(path for path, tensor in filled.items() if not bool(tensor.any()))
    if len(empty) == len(filled):
        return HolesSeen()  # nothing is in the cache yet
    alike: dict[tuple[object, ...], list[list[str]]] = {}
    for path, tensor in filled.items():
        if path in empty:
            continue
        # The last token of a row is never padding on its left, which may look the same in all layers.
        groups = alike.setdefault((tensor.dtype, *tensor.shape, *tensor.select(-2, -1).flatten().tolist()), [])
        group = next((group for group in groups if torch.equal(filled[group[0]], tensor)), None)
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    equal = (group for groups in alike.values() for group in groups if len(group) > 1)
    return HolesSeen(tuple(frozenset(group) for group in equal), empty)
