"""Tables of sublayers."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from adaskip_compile.cli.output import add_row, new_table

_MOST_SIMILAR = 16


def profile_table(profile: Any, *, every_row: bool = False) -> Table:
    """Return the sublayers of a profile, most similar first, with what was measured: the first of them, or all."""
    ranking = profile.ranking()
    title = "What each sublayer does to the residual stream"
    if not every_row and len(ranking) > _MOST_SIMILAR:
        title += f".\nThe {_MOST_SIMILAR} most similar of {len(ranking)}; --all lists the rest"
        ranking = ranking[:_MOST_SIMILAR]
    table = new_table(title, "sublayer", "kind", "similarity", "scale")
    for sublayer in ranking:
        add_row(
            table,
            sublayer.path,
            sublayer.kind,
            _number(sublayer.mean_similarity),
            _number(sublayer.mean_scale("token")),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
