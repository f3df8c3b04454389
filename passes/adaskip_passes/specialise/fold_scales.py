"""Write the scales of skipped sublayers into a graph, where one plan is all that it will ever run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from adaskip_passes.errors import PassError
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.specialise.replacements import find_scales
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class FoldScales:
    """Turn the scales that ``skip-sublayers`` reads from its input into numbers.

    ``scales`` are pairs of a sublayer's path and its scale (AdaSkip Eq. 4)::

        before:  %scale = select(%adaskip_scales, 0, 2)      after:  %b = mul(%a, 0.98)
                 %b = mul(%a, %scale)

    The numbers are rounded to float32, which the input holds, so the values stay the same bit for bit.
    The input itself stays, and has no readers left.
    """

    name: ClassVar[str] = "fold-scales"
    scales: tuple[tuple[str, float], ...] = ()

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Replace every read of a scale; ``matched`` counts them.

        :class:`PassError` where a skipped sublayer has no scale here.
        """
        by_path = dict(self.scales)
        source = find_scales(gm.graph)
        reads = [] if source is None else list(source.users)
        for node in reads:
            number = _scale(by_path, stream.paths[node.args[2]])  # type: ignore[index]
            for user in list(node.users):
                user.args = fx.node.map_arg(
                    user.args, lambda item, read=node, new=number: new if item is read else item
                )
            gm.graph.erase_node(node)
        return PassResult(stream.within(gm.graph) if reads else stream, bool(reads), len(reads))


def _scale(scales: Mapping[str, float], path: str) -> float:
    if path not in scales:
        raise PassError(f"cannot bake the scale of {path}: it is skipped, and no scale is given for it")
    return torch.tensor(scales[path], dtype=torch.float32).item()
