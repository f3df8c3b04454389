"""Show what is kept in the cache directory, and how much room it takes; or clear it.

What is removed is made again when it is needed: captures in seconds, converted checkpoints and plans in minutes; what was
learned from requests (profiles, and plans found with learn=) by learning anew. The directory is ~/.cache/adaskip, or what
$ADASKIP_CACHE_DIR says.

examples:
  adaskip cache
  adaskip cache --clear captures
  adaskip cache --clear
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from adaskip_compile.cli.output import Output, add_row, new_table
from adaskip_compile.files.cache_folder import KINDS, Kept, clear, list_kept
from adaskip_passes.errors import OptionError

_DAY = 86400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    parser.add_argument(
        "--clear",
        nargs="*",
        choices=tuple(KINDS),
        metavar="KIND",
        help=f"remove what is kept of these kinds, or of all: {', '.join(KINDS)}",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    from adaskip_compile.options import Options

    folder = Options().cache_folder
    cleared = arguments.clear is not None
    try:
        kept = clear(folder, arguments.clear or KINDS) if cleared else list_kept(folder)
    except OSError as error:
        raise OptionError(f"{error.filename or folder}: cannot be read or removed ({error.strerror})") from error
    table = new_table(f"{folder}{', removed' if cleared else ''}", "kind", "number", "MB", "last written")
    for one in kept:
        add_row(table, f"{one.kind}: {KINDS[one.kind]}", one.count, f"{one.bytes / 1e6:.1f}", _age(one))
    output.show(table)
    output.say(f"{'freed' if cleared else 'in all'}: {sum(one.bytes for one in kept) / 1e6:.1f} MB")
    output.results({"folder": str(folder), "removed": cleared, "kept": [asdict(one) for one in kept]})
    return 0


def _age(kept: Kept) -> str:
    if kept.written is None:
        return ""
    days = int((time.time() - kept.written) // _DAY)
    return {0: "today", 1: "a day ago"}.get(days, f"{days} days ago")
