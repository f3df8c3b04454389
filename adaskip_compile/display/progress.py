"""The one progress bar: where a person watches long work, at a terminal or in a notebook, and nowhere else.

It goes to standard error, for what is printed on standard output may be read by a program.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


@contextmanager
def progress_bar(title: str, total: int, wanted: bool = True) -> Iterator[Callable[[], None]]:
    """Show a bar of ``total`` steps where somebody watches and it is ``wanted``; yield what to call after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (wanted and _is_watched(console))) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
        bar.update(task, total=bar.tasks[task].completed)  # what ends early is done, too


def show_progress(items: Iterable[Item], total: int, wanted: bool, title: str) -> Iterator[Item]:
    """Yield ``items``, and show by a bar how many of ``total`` are done with."""
    with progress_bar(title, total, wanted) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def show_stages(title: str, wanted: bool = True) -> Iterator[Callable[[str], None]]:
    """Show ``title`` while something of unknown length is done; yield what to call with the name of a further stage."""
    console = _console()
    if not (wanted and _is_watched(console)):
        yield lambda stage: None
        return
    with console.status(title) as status:
        yield status.update


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _is_watched(console: Console) -> bool:
    # In a notebook rich redraws through ipywidgets, and warns at every step where they are not installed.
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)
