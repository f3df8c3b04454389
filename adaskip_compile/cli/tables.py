"""Tables of sublayers."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from adaskip_compile.cli.output import add_row, new_table


def profile_table(profile: Any) -> Table:
    """Return the sublayers of a profile, most similar first, with what was measured."""
    table = new_table("What each sublayer does to the residual stream", "sublayer", "kind", "similarity", "scale")
    for sublayer in profile.ranking():
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
