"""Replace sublayers by scaled residual identities (AdaSkip Eq. 4)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from adaskip_passes.analysis.effects import is_check
from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import call, fake_tensor, output_values, size_hint, tensor_of
from adaskip_passes.ir.module_paths import module_marks
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.specialise.replacements import Replacements
from adaskip_passes.stream.stream import ResidualStream, Sublayer


@dataclass(frozen=True)
class SkipSublayers:
    """Replace each sublayer in ``paths`` by ``b = scale * a``.

    The scales come in through a new last input, ``adaskip_scales``: ``f32[number of sublayers]``, in
    stream order, so that one graph serves every request whatever its scales. ``d_model`` wide::

        before:  %attn = linear(%mixed, %o_proj)             after:  %scale = getitem(%adaskip_scales, 0)
                 %b = add(%a, %attn)                                 %b_skipped = mul(%a, %scale)

    ``maps`` gives (path, form, rank) of the sublayers whose place a map of the stream takes instead
    (:mod:`adaskip_passes.specialise.stream_maps`). Its tensors come in through inputs of their own, after the scales, map by map
    in stream order::

        after:   %h = rms_norm(%a)
                 %h2 = linear(%h, %adaskip_2_down)
                 %h3 = linear(%h2, %adaskip_2_up, %adaskip_2_shift)
                 %b_skipped = add(%a, %h3)

    In the wiring of a graph that was cut into regions, such a map is one more region
    (:mod:`adaskip_passes.specialise.map_regions`).

    The sublayer's cache writes go. A cache output that the caller still expects becomes a view of the
    same output of a kept sublayer, so it has the right shape and holds no memory. Where no kept
    sublayer has one of that shape, the first skipped one goes on computing it, for all to view.
    What is then unused is left to ``eliminate-dead-code``.
    """

    name: ClassVar[str] = "skip-sublayers"
    paths: tuple[str, ...] = ()
    maps: tuple[tuple[str, str, int], ...] = ()

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Skip ``paths``; those that the stream has already skipped are left as they are.

        :class:`UnknownSublayerError` where the stream has no such sublayer; :class:`PassError` where one is
        probed, or a sublayer that is kept reads the values of one that is to go.
        """
        chosen = [stream.by_path(path) for path in self.paths if path not in stream.skipped]
        if not chosen:
            return PassResult(stream, False, 0)
        gone = {*stream.skipped, *self.paths}
        for sublayer in chosen:
            _require_unshared(sublayer, gone)
            if sublayer.path in stream.probed:
                raise PassError(f"cannot skip {sublayer.path}: it is probed; probe only sublayers that stay")
        replacements = Replacements(gm, len(stream.sublayers), self.maps)
        skipped = tuple(path for path in stream.paths if path in gone)
        _borrow_cache_outputs(gm, stream, gone)
        replaced: dict[fx.Node, fx.Node] = {}
        for sublayer in chosen:
            # The stream before may be the end of a sublayer that has just been replaced.
            current = sublayer.mapped(lambda node: replaced.get(node, node))
            replaced[sublayer.stream_out] = _bypass(gm.graph, current, replacements, stream.sublayers[0].stream_in)
        stream = stream.mapped(lambda node: replaced.get(node, node)).within(gm.graph)
        return PassResult(replace(stream, skipped=skipped), True, len(chosen), tuple(replacements.added))


def _require_unshared(sublayer: Sublayer, gone: set[str]) -> None:
    readers = [path for path in sublayer.shared_with if path not in gone]
    if readers:
        raise PassError(
            f"cannot skip {sublayer.path}: its values are read by {', '.join(readers)}; skip those too, or keep it"
        )


def _bypass(graph: fx.Graph, sublayer: Sublayer, replacements: Replacements, first: fx.Node) -> fx.Node:
    """Put what replaces the sublayer in the place of b, erase b and the sublayer's writes and checks, and return it; ``first`` begins the stream."""
    a, b = sublayer.stream_in, sublayer.stream_out
    wanted, got = tensor_of(b), tensor_of(a)
    with graph.inserting_before(b):
        scaled = replacements.of(sublayer.index, sublayer.path, a)
        rows = wanted.shape[1] if wanted.dim() == 3 else None
        if got.dim() == 3 and isinstance(rows, int) and rows != got.shape[1]:
            # Only its last rows are read.
            scaled = call(graph, operator.getitem, scaled, (slice(None), slice(-rows, None)), like=wanted.to(got.dtype))
        elif got.dim() > wanted.dim():
            scaled = call(graph, "flatten", scaled, 0, got.dim() - wanted.dim())
        elif got.dim() < wanted.dim():
            scaled = call(graph, "reshape_as", scaled, first)
        if got.dtype != wanted.dtype:
            scaled = call(graph, "to", scaled, wanted.dtype)
    scaled.meta = {**module_marks(b), **scaled.meta}
    b.replace_all_uses_with(scaled)
    for node in filter(is_check, reversed(sublayer.nodes)):
        graph.erase_node(node)  # of what is no longer computed
    for node in reversed(sublayer.writes):
        if hasattr(node.target, "written_inputs") and any(value.users for value in node.users):
            raise PassError(
                f"cannot skip the region of {sublayer.path}: it writes memory, and more than its sum is read"
            )
        if hasattr(node.target, "written_inputs"):
            for value in [value for value in node.users if value is not b]:
                graph.erase_node(value)  # what nobody reads would be taken out of the memory instead
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    graph.erase_node(b)
    return scaled


def _borrow_cache_outputs(gm: fx.GraphModule, stream: ResidualStream, gone: set[str]) -> None:
    """Let the cache outputs of the sublayers in ``gone`` be views of those of kept ones."""
    output = gm.graph.output_node()
    values = list(output_values(gm))
    donors: dict[tuple[object, ...], fx.Node] = {}
    borrowers: list[tuple[int, tuple[object, ...]]] = []
    for sublayer in sorted(stream.sublayers, key=lambda sublayer: sublayer.path in gone):
        for slot, position in enumerate(sublayer.cache_outputs):
            kind = _cache_kind(slot, values[position])
            if sublayer.path in gone and kind in donors:
                borrowers.append((position, kind))
            else:
                donors.setdefault(kind, values[position])  # type: ignore[arg-type]
    with gm.graph.inserting_before(output):
        for position, kind in borrowers:
            values[position] = call(gm.graph, "detach", donors[kind], like=fake_tensor(donors[kind]))
    results = tuple(output.args[0][i] if value is None else value for i, value in enumerate(values))  # type: ignore[index]
    output.args = (results,)


def _cache_kind(slot: int, node: fx.Node | None) -> tuple[object, ...]:
    """Return what two cache outputs must agree in for one to stand for the other.

    Sizes as they were when captured: each layer's cache may have a symbol of its own for its length.
    Where the symbols differ, it is left to the run time to check that the sizes agree.
    """
    value = tensor_of(node)
    sizes = tuple(size_hint(size) for size in value.shape)
    return (slot, value.dtype, value.device, sizes, tuple(size_hint(stride) for stride in value.stride()))
