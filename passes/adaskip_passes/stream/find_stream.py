"""Find the residual stream of a decoder graph, by structure alone.

The stream is the chain of values from the embedding to the final norm that each sublayer adds a
branch to: ``x_{k+1} = x_k + branch_k(x_k)``. :mod:`adaskip_passes.stream.add_trees` finds the adds that may be
part of it, :mod:`adaskip_passes.stream.chain` puts them in order and shares the nodes out; here they
become sublayers with a path, a kind and what they keep between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.ir.graph import fake_tensor
from adaskip_passes.stream.chain import Link, Part, find_chain, is_decode, joined, straight_sums
from adaskip_passes.stream.names import name_sublayers
from adaskip_passes.stream.stream import ResidualStream, Sublayer


def find_residual_stream(gm: fx.GraphModule) -> ResidualStream:
    """Find the residual stream of ``gm``. Never mutates it, and never raises for want of a stream.

    Where there is none, ``problems`` says why and ``sublayers`` is empty. Parallel branches are
    sublayers of their own in a graph that :class:`~adaskip_passes.canonicalise.straighten_stream.StraightenStream` has gone over; otherwise the tree
    that joins them is one sublayer.
    """
    dependence = Dependence(gm, find_effects(gm))
    chain = find_chain(gm, dependence)
    phase = "decode" if chain.trees and is_decode(chain.trees[0].stream) else "prefill"
    if chain.problems:
        return ResidualStream((), chain.problems, phase)
    found = [sublayer for link in chain.links for sublayer in _sublayers(link)]
    numbered = [replace(sublayer, index=index) for index, sublayer in enumerate(found)]
    return ResidualStream(name_sublayers(numbered, dependence), (), phase)


def _sublayers(link: Link) -> Iterator[Sublayer]:
    partial_sums = straight_sums(link)
    if partial_sums is None:
        yield _sublayer(joined(link), link.tree.stream, link.tree.add)
        return
    stream = link.tree.stream
    for part, total in zip(link.parts, partial_sums, strict=True):
        yield _sublayer(part, stream, total)
        stream = total


def _sublayer(part: Part, stream_in: fx.Node, stream_out: fx.Node) -> Sublayer:
    return Sublayer(
        index=0,
        path="",
        kind=part.kind,
        stateful=part.state.exists,
        stream_in=stream_in,
        stream_out=stream_out,
        branch=part.branches[-1],
        nodes=(*part.nodes, stream_out),
        writes=part.state.writes,
        cache_inputs=part.state.inputs,
        cache_outputs=part.state.outputs,
    )


def find_counters(gm: fx.GraphModule, stream: ResidualStream) -> tuple[fx.Node, ...]:
    """Return the inputs in which a preallocated cache counts its tokens: integer scalars that the graph itself advances."""
    inside = {node for sublayer in stream.sublayers for node in sublayer.nodes}
    roots = [write.root for write in find_effects(gm).writes if write.node not in inside]
    return tuple(dict.fromkeys(root for root in roots if root.op == "placeholder" and _is_counter(fake_tensor(root))))


def _is_counter(value: torch.Tensor | None) -> bool:
    return value is not None and value.dim() == 0 and not value.is_floating_point()
