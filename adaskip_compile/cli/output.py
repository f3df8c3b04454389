"""Where a command's words and numbers go: words to people, numbers as JSON where asked for."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaskip_compile.files.atomic_write import write_text

# Tables that nobody watches are read later, in a file: no terminal's width cuts their paths.
_UNWATCHED_WIDTH = 240


class Output:
    """What one command prints.

    ``json_to`` is where its results go as JSON: a path, ``"-"`` for standard output (where words then go
    to standard error), or None for nowhere.
    """

    def __init__(self, json_to: str | None = None) -> None:
        self.json_to = json_to
        self._console = Console(stderr=json_to == "-", highlight=False)
        if not self._console.is_terminal:
            self._console.width = _UNWATCHED_WIDTH

    @property
    def watched(self) -> bool:
        """Whether a person watches standard output, so that a progress bar may redraw there."""
        return self.json_to != "-" and self._console.is_terminal

    def say(self, text: object = "") -> None:
        """Print plain text for a person."""
        self._console.print(str(text), markup=False, emoji=False, soft_wrap=not self._console.is_terminal)

    def write(self, piece: str) -> None:
        """Print a piece of a text that goes on, at once and as it is."""
        self._console.file.write(piece)
        self._console.file.flush()

    def show(self, table: Table) -> None:
        """Print a table for a person."""
        self._console.print(table)

    def results(self, results: dict[str, Any]) -> None:
        """Write ``results`` as JSON to where it was asked for. A file is written whole or not at all."""
        if self.json_to is None:
            return
        text = json.dumps(results, indent=2) + "\n"
        if self.json_to == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            write_text(self.json_to, text, option="--json")


def complain(line: str) -> None:
    """Print what went wrong on standard error, as one line; in colour where a person watches and has not said NO_COLOR."""
    first, colon, rest = line.partition(": ") if line.startswith("error: ") else (line, "", "")
    text = Text.assemble(("adaskip: ", "bold"), (f"{first}{colon}", "bold red"), " ".join(rest.split("\n")))
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table whose first column is text and whose others are numbers, set to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def add_row(table: Table, *cells: object, style: str = "") -> None:
    """Add a row of plain text: brackets in a path are not markup."""
    table.add_row(*(Text(str(cell)) for cell in cells), style=style)
