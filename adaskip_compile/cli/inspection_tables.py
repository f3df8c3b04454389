"""An inspection as tables for people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli.output import Output, add_row, new_table

if TYPE_CHECKING:
    from rich.table import Table

_MEGA = 1e6


def show(output: Output, report: dict[str, Any], *, every_row: bool = False) -> None:
    """Print what :func:`adaskip_compile.inspection.report.inspection_report` gave; equal sublayers as one row or each."""
    output.say(f"{report['model']}: {report['class']}, {report['parameters']:,} parameters, {report['dtype']}")
    output.say()
    if report["sublayers"]:
        output.show(_sublayers(report, every_row))
        output.say()
        output.show(_predictions(report))
        for line in _how_timed(report):
            output.say(line)
        output.say()
    for line in report["advice"]:
        output.say(f"- {line}")


def _sublayers(report: dict[str, Any], every_row: bool) -> Table:
    rows = report["sublayers"]
    groups = [[row] for row in rows] if every_row else _equal_rows(rows)
    phases = list(rows[0]["share"])
    profiled = any(row["similarity"] is not None for row in rows)
    planned = report["plan"] is not None
    columns = ["sublayer", "kind", "parameters", "GFLOP", "weights MB", "moved MB", "cache MB"]
    columns += [f"{phase} share" for phase in phases]
    columns += ["similarity"] if profiled else []
    columns += ["scale"] if profiled or planned else []
    columns += ["prefill", "window", "steady"] if planned else []
    title = f"{len(rows)} sublayers on the residual stream; cost of a prefill of {report['context']:,} tokens"
    if len(groups) < len(rows):
        title += ".\nOf equal ones figures are those of one, shares those of all; --all lists each"
    table = new_table(title, *columns)
    for group in groups:
        row, name = group[0], _name(group)
        cost = row["cost"][phases[0]]
        cells = [name, row["kind"], f"{row['parameters']:,}", f"{cost['flops'] / 1e9:.3g}"]
        cells += [f"{cost[part] / _MEGA:.3g}" for part in ("weight_bytes", "activation_bytes", "cache_bytes")]
        cells += [f"{len(group) * row['share'][phase]:.2%}" for phase in phases]
        cells += [_number(row["similarity"])] if profiled else []
        cells += [_number(row["scale"])] if profiled or planned else []
        cells += list(row["phases"].values()) if planned else []
        add_row(table, *cells, style="dim" if row["skipped"] else "")
    return table


def _equal_rows(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return ``rows`` in groups whose figures are the same in every column, in the order of their first ones."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        told = ("kind", "parameters", "group", "similarity", "scale", "phases")
        groups.setdefault(repr([_pattern(row["path"]), *(row[key] for key in told)]), []).append(row)
    return list(groups.values())


def _name(group: list[dict[str, Any]]) -> str:
    path = group[0]["path"]
    return path if len(group) == 1 else f"{len(group)} x {_pattern(path)}"


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _predictions(report: dict[str, Any]) -> Table:
    rows = report["predictions"]
    phases = [phase for phase in rows[0] if phase != "context"]
    names = list(rows[0][phases[0]]["speedup"])
    columns = [f"{phase} {name}" for phase in phases for name in names]
    table = new_table("Predicted speed-up", "context tokens", *(f"{phase} full" for phase in phases), *columns)
    for row in rows:
        told = f"{row['context']:,}{_mark(report['timer'], row['context'])}"
        full = [_duration(row[phase]["seconds"]) for phase in phases]
        gains = [f"{row[phase]['speedup'][name]:.2f}x" for phase in phases for name in names]
        add_row(table, told, *full, *gains, style="bold" if row["context"] == report["context"] else "")
    return table


def _how_timed(report: dict[str, Any]) -> Iterator[str]:
    timer = report["timer"]
    if timer["kind"] != "measured":
        yield f"uncalibrated: a roofline of {timer['flops']:.2g} operations and {timer['bandwidth']:.2g} bytes a second"
        return
    yield f"times measured at {', '.join(f'{context:,}' for context in timer['contexts'])} tokens on {timer['machine']}"
    if any(_mark(timer, row["context"]) for row in report["predictions"]):
        yield "* not among the lengths that were measured: what was found there is taken to go on"
    if timer["doubts"]:
        yield "in doubt; measure again with nothing else running, or with more --rounds:"
        yield from (f"  {doubt}" for doubt in timer["doubts"])


def _mark(timer: dict[str, Any], context: int) -> str:
    measured = timer["kind"] != "measured" or timer["contexts"][0] <= context <= timer["contexts"][-1]
    return "" if measured else " *"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
