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


def sublayer_table(rows: list[dict[str, Any]], *, profiled: bool, planned: bool) -> Table:
    """Return the sublayers of a model in stream order, with the columns that there is something to say in."""
    columns = ["sublayer", "kind", "stateful", "parameters"]
    columns += ["similarity", "scale"] if profiled else []
    columns += ["plan"] if planned else []
    table = new_table(f"{len(rows)} sublayers on the residual stream", *columns)
    for row in rows:
        count = row["parameters"]
        cells = [row["path"], row["kind"], "yes" if row["stateful"] else "no", "-" if count is None else f"{count:,}"]
        cells += [_number(row["similarity"]), _number(row["scale"])] if profiled else []
        cells += ["skipped" if row["skipped"] else "kept"] if planned else []
        add_row(table, *cells)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
