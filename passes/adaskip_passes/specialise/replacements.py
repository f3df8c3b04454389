"""What replaces a skipped sublayer: a scale of the stream (AdaSkip Eq. 4), or a map of it.

The numbers come in through inputs that are added last: ``adaskip_scales``, ``f32[number of sublayers]`` in stream order, and
the tensors of each map (:mod:`adaskip_passes.specialise.stream_maps`), so that one graph serves every request whatever they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from adaskip_passes.analysis.regions import Region
from adaskip_passes.ir.graph import add_placeholder, call, fake_tensor, tensor_of
from adaskip_passes.pipeline.pipeline import AddedInput
from adaskip_passes.specialise.map_regions import MapRegions
from adaskip_passes.specialise.stream_maps import FORMS, emit_map, part_shapes

SCALES_INPUT = "adaskip_scales"
SCALES = "scales"
# Under this key an input's node says what was added: a captured input may have any name.
_ADDED = "adaskip_added"


class Replacements:
    """Adds to a graph of ``count`` sublayers what replaces skipped ones, and the inputs that it takes.

    ``added`` are the inputs. ``maps`` gives (path, form, rank) of those that a map of the stream replaces; a scale replaces the others.
    """

    def __init__(self, gm: fx.GraphModule, count: int, maps: Iterable[tuple[str, str, int]]) -> None:
        self._graph, self._forms = gm.graph, {path: (form, rank) for path, form, rank in maps}
        self._device = next(value.device for node in gm.graph.nodes if (value := fake_tensor(node)) is not None)
        self.added: list[AddedInput] = []
        self._scales = find_scales(gm.graph) or self._input(AddedInput(SCALES_INPUT, SCALES), (count,), torch.float32)
        self._one: torch.Tensor | None = None
        cut = any(isinstance(node.target, Region) for node in gm.graph.nodes)
        self._map_regions = MapRegions(gm.graph) if cut else None

    def of(self, index: int, path: str, a: fx.Node) -> fx.Node:
        """Compute b from ``a`` for the sublayer of that place and path, in the dtype of ``a``; return b."""
        stream = tensor_of(a)
        if path not in self._forms:
            # A scale of no dimensions changes neither shape nor dtype.
            return call(self._graph, torch.mul, a, self._scale(index), like=stream)
        form, rank = self._forms[path]
        shapes = part_shapes(form, stream.shape[-1], rank)
        parts = [
            self._input(AddedInput(f"adaskip_{index}_{part}", part, path), shapes[part], stream.dtype, like=stream)
            for part in FORMS[form]
        ]
        # A map of one op is no more than a scale: a region would only add to its time.
        if self._map_regions is None or form == "channel":
            return emit_map(self._graph, form, a, parts)
        return self._map_regions.call(form, a, parts)

    def _scale(self, index: int) -> fx.Node:
        scale = call(self._graph, "select", self._scales, 0, index, like=self._one)
        self._one = fake_tensor(scale)
        return scale

    def _input(
        self, added: AddedInput, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor | None = None
    ) -> fx.Node:
        device = self._device if like is None else like.device
        node = add_placeholder(self._graph, added.name, torch.empty(shape, dtype=dtype, device=device))
        # A captured input may have the name already: fx has chosen another one then.
        node.meta[_ADDED] = added = replace(added, name=node.name)
        self.added.append(added)
        return node


def find_scales(graph: fx.Graph) -> fx.Node | None:
    """Return the input of ``graph`` that brings the scales, None where no skip has added one."""
    inputs = (node for node in graph.find_nodes(op="placeholder") if _ADDED in node.meta)
    return next((node for node in inputs if node.meta[_ADDED].part == SCALES), None)
