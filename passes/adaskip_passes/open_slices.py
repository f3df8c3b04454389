"""Slices to the end of a dimension of any size, written with the end that they have.

``x[:, -1:]`` reaches an inner compiler as a slice up to the greatest integer. One that makes code for sizes of any
value has to show that no size is greater; Inductor before torch 2.13 does not, and gives up::

    %y = getitem(%x, (:, -1:))        %n = size(%x, 1)
                                      %y = getitem(%x, (:, -1:%n))
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from adaskip_passes.graph import call, fake_tensor


def close_slices(gm: fx.GraphModule) -> int:
    """Rewrite the open slices of ``gm`` over symbolic dimensions in place; return how many there were."""
    closed = 0
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        source, index = node.args
        items = index if isinstance(index, tuple) else (index,)
        places = _open(source, items)
        if not places:
            continue
        with gm.graph.inserting_before(node):
            ends = {place: call(gm.graph, "size", source, dim) for place, dim in places.items()}
        ended = (slice(one.start, ends[place], one.step) if place in ends else one for place, one in enumerate(items))
        node.args = (source, tuple(ended))
        closed += len(places)
    if closed:
        gm.graph.lint()
        gm.recompile()
    return closed


def _open(source: Any, items: tuple[Any, ...]) -> dict[int, int]:
    """Return the dimension of each of ``items`` that is an open slice of a symbolic one, by its place."""
    value = fake_tensor(source)
    if value is None or any(isinstance(one, fx.Node) for one in items):
        return {}  # an index that is a tensor takes as many dimensions as it has
    taking = [place for place, one in enumerate(items) if one is not None and one is not Ellipsis]
    dims = {place: count for count, place in enumerate(taking)}
    if Ellipsis in items:
        behind = items.index(Ellipsis)
        dims |= {place: dim + value.dim() - len(taking) for place, dim in dims.items() if place > behind}
    return {
        place: dim
        for place, dim in dims.items()
        if isinstance(one := items[place], slice)
        and one.start is not None
        and one.stop is None
        and not isinstance(value.shape[dim], int)
    }
