"""The pipelines that specialise a captured graph, each place with its reason."""

from __future__ import annotations

from adaskip_passes.pipeline.pipeline import Pass
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.narrow_rows import NarrowRows
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.specialise.skip_sublayers import SkipSublayers


def skip_passes(
    skipped: tuple[str, ...], probed: tuple[str, ...] = (), maps: tuple[tuple[str, str, int], ...] = ()
) -> tuple[Pass, ...]:
    """Return the pipeline that skips for all rows, on the whole graph or on its wiring."""
    return (
        InsertProbes(probed),  # first: it needs the stream as captured, and only measures
        SkipSublayers(skipped, maps),  # then the skips: probed sublayers stay, so the probes stand
        EliminateDeadCode(),  # last: what the skips have cut off
    )


def row_passes(body: SkipBodyRows | None = None) -> tuple[Pass, ...]:
    """Return the pipeline that leaves to a prompt the rows that something is computed of, before its graph is cut."""
    if body is None:
        return (NarrowRows(), EliminateDeadCode())  # of every prompt the last row is read, and often no other
    return (
        body,  # first: it cuts the rows apart
        NarrowRows(max(body.head, body.tail)),  # then what each row needs is known
        EliminateDeadCode(),  # last: what was computed for all rows
    )
