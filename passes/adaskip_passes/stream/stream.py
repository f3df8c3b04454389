"""The residual stream of a decoder graph, as data: its sublayers, and what passes have done to them.

:func:`adaskip_passes.stream.find_stream.find_residual_stream` finds it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from adaskip_passes.errors import UnknownSublayerError

# What a sublayer is, by what it does; and what a graph is captured for.
Kind = Literal["attention", "ssm", "ffn"]
Phase = Literal["prefill", "decode"]


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
    kind: Kind
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
    those that they have skipped for the body of a prompt, ``windowed`` those whose attention has a window there.
    """

    sublayers: tuple[Sublayer, ...]
    problems: tuple[str, ...] = ()
    phase: Phase = "prefill"
    skipped: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()
    body_skipped: tuple[str, ...] = ()
    windowed: tuple[str, ...] = ()

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


# Of a graph in which none has been looked for: of a region, or of one just captured.
NO_STREAM = ResidualStream((), ("none has been looked for",))
