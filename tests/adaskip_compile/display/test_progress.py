"""Long work shows a bar where a person watches, and nothing elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from adaskip_compile.display import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "_console", lambda: console)
    return shown


def last_line(terminal: io.StringIO) -> str:
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", terminal.getvalue()).rstrip().splitlines()[-1]


def test_a_bar_counts_to_its_end(terminal: io.StringIO) -> None:
    assert list(progress.show_progress(iter("abc"), 3, True, "reading")) == ["a", "b", "c"]
    assert "reading" in last_line(terminal)
    assert "3/3" in last_line(terminal)


def test_a_search_that_ends_early_is_done(terminal: io.StringIO) -> None:
    assert len(list(progress.show_progress(range(2), 40, True, "searching"))) == 2
    assert "2/2" in last_line(terminal)


def test_stages_are_named(terminal: io.StringIO) -> None:
    with progress.show_stages("exporting") as report:
        report("decode")
    assert "decode" in last_line(terminal)


@pytest.mark.parametrize("wanted", [False, True])
def test_nobody_is_shown_what_nobody_watches(wanted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress.show_progress(range(3), 3, wanted, "reading"):
        pass
    with progress.show_stages("exporting", wanted) as report:
        report("decode")
    assert capsys.readouterr() == ("", "")


def test_what_is_not_wanted_is_not_shown(terminal: io.StringIO) -> None:
    for _ in progress.show_progress(range(3), 3, False, "reading"):
        pass
    assert terminal.getvalue().strip() == ""


def test_a_notebook_without_widgets_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_jupyter=True)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert not progress._is_watched(console)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: object())
    assert progress._is_watched(console)
