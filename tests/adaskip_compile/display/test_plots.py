"""Profiles and plans are drawn where people would rather look."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from adaskip_compile import Profile
from adaskip_compile.display.plots import check_plot, write_plot
from adaskip_compile.planning.prompt_skips import PromptSkips, Trade
from adaskip_compile.planning.quality import Quality
from adaskip_passes.errors import OptionError, PlanError
from tests.golden_files import GOLDEN

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


def test_a_profile_is_drawn_by_depth() -> None:
    profile = Profile.load(GOLDEN / "files" / "profile.json")
    axes = profile.plot()
    drawn = {line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.get_lines()}
    kinds = {one.kind for one in profile.sublayers}
    assert drawn == {kind: [one.mean_similarity for one in profile.sublayers if one.kind == kind] for kind in kinds}
    assert profile.plot(axes) is axes


def test_a_frontier_is_drawn_with_what_each_set_loses() -> None:
    trades = (
        Trade(8, 8, 1.4, True, Quality(0.01, 0.002, 1.0, 1.0, 0.0)),
        Trade(4, 10, 1.5, False, Quality(0.03, 0.004), windows=6),
    )
    axes = PromptSkips((), frontier=trades).plot()
    within, over = (container.lines[0] for container in axes.containers)
    assert (within.get_xdata()[0], over.get_xdata()[0]) == (1.4, 1.5)
    assert within.get_ydata()[0] == pytest.approx(1.005, abs=1e-3)
    assert [text.get_text() for text in axes.texts] == ["8 attentions, 8 FFNs", "4 attentions, 10 FFNs, 6 windows"]


def test_what_was_not_measured_is_not_drawn() -> None:
    with pytest.raises(PlanError, match="no frontier to draw"):
        PromptSkips(()).plot()


def test_a_plot_is_written_whole(tmp_path: Path) -> None:
    write_plot(tmp_path / "plot.svg", Profile.load(GOLDEN / "files" / "profile.json").plot)
    assert "Similarity by depth" in (tmp_path / "plot.svg").read_text()


def test_it_is_said_beforehand_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"plot\.gif: takes a file that ends in \.png, \.svg, \.pdf"):
        check_plot("plot.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: check_plot("plot.svg"), Profile.load(GOLDEN / "files" / "profile.json").plot):
        with pytest.raises(OptionError, match=r"needs matplotlib: pip install 'adaskip-compile\[evaluation\]'"):
            draw()
