"""The examples run, with a tiny model in place of the pretrained one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import adaskip_compile
from adaskip_compile.fitting import loss_budget
from adaskip_compile.fitting.budget_texts import BudgetSizes
from examples import ask_long_text, compare_plans, watch_ffns
from tests.made_up_texts import made_up
from tests.test_readme import tiny_checkpoint

pytestmark = pytest.mark.shares_captures


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ask_long_text, compare_plans, watch_ffns):
        monkeypatch.setattr(module, "load_checkpoint", tiny_checkpoint)
    monkeypatch.setattr(adaskip_compile, "compile", functools.partial(adaskip_compile.compile, inner="eager"))


def test_a_long_text_is_asked_about(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = BudgetSizes(prompt=320, continued=32, fitted=2, measured=2, needles=1)
    monkeypatch.setattr(loss_budget, "BudgetSizes", lambda: small)
    (tmp_path / "book.txt").write_text(made_up("sea", 1))
    ask_long_text.main(
        [str(tmp_path / "book.txt"), "Who goes to sea?", "--context", "400", "--max-loss", "9", "--new-tokens", "4"]
    )
    said = capsys.readouterr().out
    assert "400 tokens of prompt" in said
    assert "prompt" in said.split("400 tokens of prompt")[1]


def test_plans_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    compare_plans.main(["--skip", "2", "4", "--tokens", "48", "--texts", "2", "--out", str(tmp_path / "plots")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[1:-1]] == [
        [policy, count] for policy in ("adaskip", "early_exit", "random") for count in ("2", "4")
    ]
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"similarity.svg", "losses.svg"}


def test_ffns_are_watched(capsys: pytest.CaptureFixture[str]) -> None:
    watch_ffns.SEEN.clear()
    watch_ffns.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"model.layers.{index}.mlp" for index in range(6)]
    assert all(len(sizes) == 8 for sizes in watch_ffns.SEEN.values())
