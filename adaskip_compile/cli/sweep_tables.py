"""A sweep's results, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from adaskip_compile.cli.output import Output, add_row, new_table
from adaskip_compile.evaluation.tradeoff import Row

_MEBI = 2**-20


def show(output: Output, rows: Sequence[Row]) -> None:
    """Print the table: a line a candidate."""
    names = list(rows[0].measures)
    title = "Quality (mean ± standard error) and speed-up against the full model (median, least to greatest)"
    table = new_table(title, "plan", "NLL loss", "request", "prefill", "decode", "KV cache", *names)
    for row in rows:
        speeds = (spread.format(1, 2, "x") for spread in (row.request, row.prefill, row.decode))
        scores = (str(row.measures[name]) for name in names)
        add_row(table, row.candidate.name, f"{row.loss:+.3f}", *speeds, f"{row.cache_bytes * _MEBI:.1f} MiB", *scores)
    output.show(table)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table as JSON holds it, with the value of every item."""
    return [
        {
            "name": row.candidate.name,
            "policy": row.candidate.policy,
            "skip": row.candidate.skip,
            "compensation": row.candidate.compensation,
            "skipped": list(row.candidate.plan.paths),
            "prompt_skipped": [] if row.candidate.plan.prompt is None else list(row.candidate.plan.prompt.paths),
            "nll_loss": row.loss,
            "speedup": {what: asdict(getattr(row, what)) for what in ("request", "prefill", "decode")},
            "cache_bytes": row.cache_bytes,
            "measures": {name: list(scores.values) for name, scores in row.measures.items()},
        }
        for row in rows
    ]
