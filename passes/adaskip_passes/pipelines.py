"""The way of a graph from its capture to an inner compiler: every pipeline, each place with its reason.

::

    captured -> CANONICALISE -> a user's own passes -> GROW -> row_passes -> CUT -> skip_passes -> LOWER

What a skip set does not change is done once for a graph, and shared. :class:`~adaskip_passes.pipeline.derived_graph.DerivedGraph`
runs them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from adaskip_passes.canonicalise.simplify_masks import SimplifyMasks
from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.errors import PassError
from adaskip_passes.lower.decompose_one_query_attention import DecomposeOneQueryAttention
from adaskip_passes.lower.decompose_one_row_linear import DecomposeOneRowLinear
from adaskip_passes.lower.fold_rows import FoldRows
from adaskip_passes.lower.pin_layout import PinLayout
from adaskip_passes.lower.use_banded_attention import UseBandedAttention
from adaskip_passes.lower.use_many_row_linear import UseManyRowLinear
from adaskip_passes.pipeline.pipeline import Pass, PipelineResult, run_pipeline
from adaskip_passes.specialise.append_in_place import AppendInPlace
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.merge_equal_nodes import MergeEqualNodes
from adaskip_passes.specialise.narrow_rows import NarrowRows
from adaskip_passes.specialise.outline_regions import OutlineRegions
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.stream import NO_STREAM, ResidualStream

# The stream alone: where the graph is to stay near what it was, or masks have been seen to already.
STRAIGHTEN: tuple[Pass, ...] = (StraightenStream(),)

CANONICALISE: tuple[Pass, ...] = (
    SimplifyMasks(),  # first: what made a mask goes, and is in nobody's way
    StraightenStream(),  # then the stream is found, that all that follows reads
)

GROW: tuple[Pass, ...] = (
    AppendInPlace(),  # before rows are cut: it knows a cache's appends by their shapes as captured
    MergeEqualNodes(),  # what each layer computes of sizes and positions is once enough
)

CUT: tuple[Pass, ...] = (OutlineRegions(),)  # after all that looks into sublayers, and before what differs by skip set

# Faster operations of ours in place of PyTorch's, also where nothing is compiled.
USE_KERNELS: tuple[Pass, ...] = (UseManyRowLinear(), UseBandedAttention())

# For Inductor, on each region or on the whole graph.
LOWER: tuple[Pass, ...] = (
    DecomposeOneRowLinear(),  # before many rows: what has one row is a decode step's
    DecomposeOneQueryAttention(),  # before bands, likewise
    *USE_KERNELS,
    FoldRows(),  # after: what the others have taken needs no folding
    PinLayout(),  # last: of outputs as they come to be
)


def canonicalised(gm: fx.GraphModule, passes: Sequence[Pass] = STRAIGHTEN) -> PipelineResult:
    """Return a copy of a captured graph with the residual stream found in it; where it cannot be verified, the problem with it."""
    try:
        return run_pipeline(gm, NO_STREAM, passes)
    except PassError as error:
        return PipelineResult(gm, ResidualStream((), (str(error),)), ())


def row_passes(body: SkipBodyRows | None = None) -> tuple[Pass, ...]:
    """Return the pipeline that leaves to a prompt the rows that something is computed of, before its graph is cut."""
    if body is None:
        return (NarrowRows(), EliminateDeadCode())  # of every prompt the last row is read, and often no other
    return (
        body,  # first: it cuts the rows apart
        NarrowRows(max(body.head, body.tail)),  # then what each row needs is known
        EliminateDeadCode(),  # last: what was computed for all rows
    )


def skip_passes(
    skipped: tuple[str, ...], probed: tuple[str, ...] = (), maps: tuple[tuple[str, str, int], ...] = ()
) -> tuple[Pass, ...]:
    """Return the pipeline that skips for all rows, on the whole graph or on its wiring."""
    return (
        InsertProbes(probed),  # first: it needs the stream as captured, and only measures
        SkipSublayers(skipped, maps),  # then the skips: probed sublayers stay, so the probes stand
        EliminateDeadCode(),  # last: what the skips have cut off
    )
