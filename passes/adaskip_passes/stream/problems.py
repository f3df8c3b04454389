"""What keeps a graph from having one residual stream: each reason is a sentence that names a node."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.ir.graph import fake_tensor, output_values
from adaskip_passes.stream.add_trees import AddTree, is_add


def stream_problems(
    gm: fx.GraphModule,
    candidates: Sequence[AddTree],
    chain: Sequence[AddTree],
    dependence: Dependence,
    weighted: Sequence[fx.Node],
) -> Iterator[str]:
    """Yield why ``chain``, the longest of the ``candidates``, is not the one stream of ``gm``; nothing where it is."""
    if not chain:
        yield _why_none(gm, weighted)
        return
    members = {tree.add for tree in chain}
    beside = [
        tree.add.name
        for tree in candidates
        if tree.add not in members and dependence.depends(tree.add, chain[0].stream)
    ]
    if beside:
        yield f"several streams: {len(beside)} residual adds lie beside the longest chain, {beside[0]} first"
        return
    # A norm may stand between one add and the next stream; a matrix makes several streams of one.
    matrices = dependence.bits(weighted)
    mixed = [
        after.stream.name
        for before, after in itertools.pairwise(chain)
        if after.stream is not before.add and dependence.any_between(before.add, after.stream, matrices)
    ]
    if mixed:
        yield f"several streams: {len(mixed)} values of the stream are mixed by weights beside it, {mixed[0]} first"


def _why_none(gm: fx.GraphModule, weighted: Sequence[fx.Node]) -> str:
    """Tell hyper-connections, whose streams lie side by side in values of rank 4, from graphs without any stream."""
    width = next((value.shape[-1] for node in weighted if (value := fake_tensor(node)) is not None), None)
    stacked = [node.name for node in gm.graph.nodes if is_add(node) and _rank_and_width(node) == (4, width)]
    if len(stacked) > 1:
        return (
            f"several streams: {len(stacked)} adds join values of rank 4 and of the model's width, {stacked[0]} first, "
            "in which each sublayer mixes several streams with one another"
        )
    return "no add joins a value with a branch computed from it"


def _rank_and_width(node: fx.Node) -> tuple[int, object]:
    value = fake_tensor(node)
    return (0, None) if value is None or not value.dim() else (value.dim(), value.shape[-1])


def entries_outside(
    gm: fx.GraphModule, inside: set[fx.Node], last: fx.Node, dependence: Dependence, weighted: Sequence[fx.Node]
) -> Iterator[str]:
    """Yield which cache entries no sublayer computes, as where the model runs its layers several times over.

    ``inside`` are the nodes of all sublayers, ``last`` the last add of the stream.
    """
    matrices = dependence.bits(weighted)
    entries = [
        node.name
        for node in output_values(gm)
        if node is not None
        and node not in inside
        and len(getattr(fake_tensor(node), "shape", ())) >= 3
        and not dependence.reaches(last, node)
        and dependence.last_before(node, matrices) is not None
    ]
    if entries:
        yield f"several streams: {len(entries)} cache entries are computed outside the stream, {entries[0]} first"
