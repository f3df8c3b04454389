"""Show what differs between two plans: what each skips, when, and what stands in its place.

examples:
  adaskip diff plan.json other.json
  adaskip diff plan.json other.json --json -
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from adaskip_compile.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    for name, shown in (("one", "PLAN"), ("other", "OTHER")):
        parser.add_argument(name, metavar=shown, help="a file that 'adaskip plan' wrote")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    from rich.table import Table
    from rich.text import Text

    from adaskip_compile.planning.plan_difference import differences
    from adaskip_compile.planning.skip_plan import SkipPlan

    found = differences(SkipPlan.load(arguments.one), SkipPlan.load(arguments.other))
    if found:
        table = Table(box=None, header_style="dim")
        for heading in ("", arguments.one, arguments.other):
            table.add_column(heading, overflow="fold")
        for row in found:
            table.add_row(*(Text(cell) for cell in (row.what, row.one, row.other)))
        output.show(table)
    else:
        output.say("the plans say the same")
    output.results({"one": arguments.one, "other": arguments.other, "differences": [asdict(row) for row in found]})
    return 0
