"""Find the residual stream of a decoder graph, by structure alone.

The stream is the chain of values from the embedding to the final norm that each sublayer adds a
branch to: ``x_{k+1} = x_k + branch_k(x_k)``. :mod:`adaskip_passes.stream.add_trees` finds the adds that may be
part of it, :mod:`adaskip_passes.stream.chain` puts them in order and shares the nodes out; here they
become sublayers with a path, a kind and what they keep between calls.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.errors import UnknownSublayerError
from adaskip_passes.stream.chain import Link, Part, find_chain, is_decode, joined, straight_sums
from adaskip_passes.stream.names import name_sublayers


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of the stream: everything between two consecutive values of it.

    ``stream_in`` is a, the stream before (``(batch, seq, d_model)``); ``stream_out`` is b, the add
    that follows; ``branch`` the operand that the sublayer contributes to it. ``nodes`` is its region
    in graph order: what depends on a and not on b, then b itself. Of parallel branches, each one's b
    is the sum so far: ``b_1 = x + branch_1``, ``b_2 = b_1 + branch_2``; what feeds both (a norm before
    them) is in neither region.

    ``writes`` are the region's in-place writes that outlive it; ``cache_inputs`` the caller's tensors
    that only this sublayer reads or writes, its K and V or its state; ``cache_outputs`` the positions
    of the graph outputs that only it produces. ``shared_with`` names later sublayers that read values
    of the region beside the stream, as layers that share K and V do.
    """

    index: int
    path: str
    kind: str
    stateful: bool
    stream_in: fx.Node
    stream_out: fx.Node
    branch: fx.Node
    nodes: tuple[fx.Node, ...] = field(repr=False)
    writes: tuple[fx.Node, ...] = ()
    cache_inputs: tuple[fx.Node, ...] = ()
    cache_outputs: tuple[int, ...] = ()
    shared_with: tuple[str, ...] = ()

    @property
    def recurrent(self) -> bool:
        """Whether its state is carried from token to token, and cannot be kept without running it: no keys and values."""
        return self.stateful and self.kind != "attention"

    @property
    def all_nodes(self) -> Iterator[fx.Node]:
        """Every node that this names, some of them several times."""
        yield from (self.stream_in, self.stream_out, self.branch, *self.nodes, *self.writes, *self.cache_inputs)

    def within(self, nodes: Container[fx.Node]) -> Sublayer:
        """Return this sublayer without the nodes that are none of ``nodes``; without a branch the end stands for it."""

        def left(some: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
            return tuple(node for node in some if node in nodes)

        branch = self.branch if self.branch in nodes else self.stream_out
        return replace(self, branch=branch, nodes=left(self.nodes), writes=left(self.writes))

    def mapped(self, to: Callable[[fx.Node], fx.Node]) -> Sublayer:
        """Return this sublayer with every node replaced by its image under ``to``."""
        return replace(
            self,
            stream_in=to(self.stream_in),
            stream_out=to(self.stream_out),
            branch=to(self.branch),
            nodes=tuple(map(to, self.nodes)),
            writes=tuple(map(to, self.writes)),
            cache_inputs=tuple(map(to, self.cache_inputs)),
        )


@dataclass(frozen=True)
class ResidualStream:
    """The sublayers of a graph in stream order, or the problems that keep it from having one.

    ``phase`` is ``"decode"`` where the stream holds one token a row, else ``"prefill"``. ``skipped``
    and ``probed`` are the paths that passes have since skipped or probed, in stream order; ``body_skipped`` are
    those that they have skipped for the body of a prompt.
    """

    sublayers: tuple[Sublayer, ...]
    problems: tuple[str, ...] = ()
    phase: str = "prefill"
    skipped: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()
    body_skipped: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all sublayers in stream order."""
        return tuple(sublayer.path for sublayer in self.sublayers)

    @property
    def kept(self) -> tuple[Sublayer, ...]:
        """The sublayers that no pass has skipped."""
        return tuple(sublayer for sublayer in self.sublayers if sublayer.path not in self.skipped)

    def by_path(self, path: str) -> Sublayer:
        """Return the sublayer of that path; :class:`UnknownSublayerError` lists what there is."""
        for sublayer in self.sublayers:
            if sublayer.path == path:
                return sublayer
        near = difflib.get_close_matches(path, self.paths, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise UnknownSublayerError(
            f"no sublayer {path!r} in this graph{hint}; it has: {', '.join(self.paths) or 'none'}"
        )

    def mapped(self, to: Callable[[fx.Node], fx.Node]) -> ResidualStream:
        """Return this stream over a copy of its graph; ``to`` gives each node's copy."""
        return replace(self, sublayers=tuple(sublayer.mapped(to) for sublayer in self.sublayers))

    def within(self, graph: fx.Graph) -> ResidualStream:
        """Return this stream without the nodes that have been erased from ``graph``: what a pass that erases some returns."""
        nodes = set(graph.nodes)
        return replace(self, sublayers=tuple(sublayer.within(nodes) for sublayer in self.sublayers))

    def __str__(self) -> str:
        if self.problems:
            return "no residual stream: " + "; ".join(self.problems)
        width = max(map(len, self.paths))
        return "\n".join(
            f"{sublayer.index:>4}  {sublayer.path:<{width}}  {sublayer.kind:<9}  "
            f"{'stateful' if sublayer.stateful else 'stateless'}"
            for sublayer in self.sublayers
        )


def find_residual_stream(gm: fx.GraphModule) -> ResidualStream:
    """Find the residual stream of ``gm``. Never mutates it, and never raises for want of a stream.

    Where there is none, ``problems`` says why and ``sublayers`` is empty. Parallel branches are
    sublayers of their own in a graph that :func:`straighten_stream` has gone over; otherwise the tree
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
