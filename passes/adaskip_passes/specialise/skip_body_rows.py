"""Skip sublayers for most rows of a prompt, and keep their keys and values; of attentions that stay, skip the far keys."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import call, fake_tensor, tensor_of
from adaskip_passes.ir.module_paths import module_marks
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.specialise.replacements import Replacements
from adaskip_passes.specialise.window_attention import window_attention
from adaskip_passes.stream.stream import ResidualStream, Sublayer

_ROWS = 1  # of a stream (batch, rows, d_model)
_LEAST_ROWS = 4  # for each row that runs in full


@dataclass(frozen=True)
class SkipBodyRows:
    """Replace each sublayer in ``paths`` for the rows between the first ``head`` and the last ``tail``, the body of a prompt.

    The other rows stay what they are, and so do the sublayer's writes to the cache: keys and values are computed of all
    rows, from the stream as it is then. So nothing that comes later needs to know of the skip::

        before:  %b = add(%a, %branch)           after:  %b = add(%a, %branch)
                                                         %body = low_rank_map(getitem(%a, (:, 1:-16)))
                                                         %b_skipped = cat([getitem(%b, (:, :1)), %body,
                                                                           getitem(%b, (:, -16:))], 1)

    Of an attention in ``windows``, (path, keys), the rows of the body see so many keys before them, and the first ``head``
    (:mod:`adaskip_passes.specialise.window_attention`). Where it is no attention that is known to be causal, it stays as it
    is: ``windowed`` of the stream tells of those that have a window.

    That the branch is computed of all rows still is left to ``narrow-rows`` to mend. A replacement is a scale, or the
    map that ``maps`` names by (path, form, rank); its numbers come in as they do for ``skip-sublayers``.
    The graph must not be called for fewer rows than ``least_rows``, nor have been captured with fewer than ``fewest_rows``
    (:meth:`~adaskip_passes.pipeline.derived_graph.DerivedGraph.for_rows`).
    """

    name: ClassVar[str] = "skip-body-rows"
    paths: tuple[str, ...] = ()
    maps: tuple[tuple[str, str, int], ...] = ()
    head: int = 1
    tail: int = 16
    windows: tuple[tuple[str, int], ...] = ()

    @property
    def least_rows(self) -> int:
        """How many rows a prompt has at least whose body is worth skipping for."""
        return _LEAST_ROWS * (self.head + self.tail)

    @property
    def fewest_rows(self) -> int:
        """With how many rows a graph may have been captured: of a body of two nothing is known that is not so of longer ones."""
        return self.head + self.tail + 2

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Skip ``paths``; those that are skipped so already are left as they are.

        :class:`UnknownSublayerError` where the stream has no such sublayer, :class:`PassError` where it is no stream of
        ``(batch, rows, d_model)``, or one is skipped or probed already.
        """
        chosen = [stream.by_path(path) for path in self.paths if path not in stream.body_skipped]
        for sublayer in chosen:
            if sublayer.path in (*stream.skipped, *stream.probed):
                raise PassError(f"cannot skip the body rows of {sublayer.path}: it is skipped or probed")
        windowed = self._windowed(stream)
        if windowed:
            stream = replace(
                stream, windowed=tuple(one for one in stream.paths if one in (*stream.windowed, *windowed))
            )
        if not chosen:
            return PassResult(stream, bool(windowed), len(windowed))
        replacements = Replacements(gm, len(stream.sublayers), self.maps)
        replaced: dict[fx.Node, fx.Node] = {}
        sublayers = {}
        for sublayer in stream.sublayers:
            current = sublayer.mapped(lambda node: replaced.get(node, node))
            if sublayer in chosen:
                current, b = self._skip(gm.graph, current, replacements)
                replaced[sublayer.stream_out] = b
            sublayers[sublayer.path] = current
        gone = {*stream.body_skipped, *self.paths}
        skipped = tuple(path for path in stream.paths if path in gone)
        stream = replace(stream, sublayers=tuple(sublayers.values()), body_skipped=skipped)
        return PassResult(stream, True, len(chosen) + len(windowed), tuple(replacements.added))

    def _windowed(self, stream: ResidualStream) -> tuple[str, ...]:
        """Give the attentions their windows; return the paths of those that have one now."""
        wanted = [(stream.by_path(path), window) for path, window in self.windows if path not in stream.windowed]
        return tuple(one.path for one, window in wanted if window_attention(one, window, self.head, self.tail))

    def _skip(self, graph: fx.Graph, sublayer: Sublayer, replacements: Replacements) -> tuple[Sublayer, fx.Node]:
        """Return the sublayer as it is now, and the value of the stream that ends it."""
        a, b = sublayer.stream_in, sublayer.stream_out
        before, after = fake_tensor(a), fake_tensor(b)
        if before is None or after is None or before.shape != after.shape or before.dim() != 3:
            raise PassError(f"cannot skip the body rows of {sublayer.path}: its stream is not (batch, rows, d_model)")
        readers = list(b.users)
        known = set(graph.nodes)
        with graph.inserting_before(b.next):
            kept = [_cut(graph, b, slice(None, self.head))] if self.head else []
            body = _cut(graph, a, slice(self.head or None, -self.tail))
            body = replacements.of(sublayer.index, sublayer.path, body)
            if before.dtype != after.dtype:
                body = call(graph, "to", body, after.dtype)
            joined = call(graph, torch.cat, [*kept, body, _cut(graph, b, slice(-self.tail, None))], _ROWS, like=after)
        joined.meta = {**module_marks(b), **joined.meta}
        for reader in readers:
            reader.replace_input_with(b, joined)
        added = tuple(node for node in graph.nodes if node not in known and node.op != "placeholder")
        return replace(sublayer, stream_out=joined, nodes=(*sublayer.nodes, *added)), joined


def _cut(graph: fx.Graph, node: fx.Node, rows: slice) -> fx.Node:
    """Add a view of some rows of a stream; a call has so many, so that it need not be asked."""
    value = tensor_of(node)
    batch, size, width = value.shape
    start, stop = rows.start or 0, rows.stop
    count = -start if start < 0 else stop - start if stop is not None and stop > 0 else size + (stop or 0) - start
    with value.fake_mode:  # type: ignore[attr-defined]
        like = torch.empty_strided((batch, count, width), value.stride(), dtype=value.dtype, device=value.device)
    return call(graph, operator.getitem, node, (slice(None), rows), like=like)
