"""The Python in docs/ runs, with a tiny model in place of the pretrained one; its commands exist; its links lead somewhere."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import adaskip_compile
from adaskip_compile import checkpoints, cli
from adaskip_compile.fitting.budget_texts import BudgetSizes
from tests.test_readme import tiny_checkpoint

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "load_checkpoint", tiny_checkpoint)
    monkeypatch.setattr(adaskip_compile, "compile", functools.partial(adaskip_compile.compile, inner="eager"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = BudgetSizes(prompt=320, continued=32, fitted=2, measured=2, needles=1)
    search = functools.partial(adaskip_compile.plan_within_loss, sizes=small)
    monkeypatch.setattr(adaskip_compile, "plan_within_loss", search)
    # The runner that an exported folder brings; another dict of modules in place of this one breaks imports.
    monkeypatch.delitem(sys.modules, "generate", raising=False)
    names: dict = {}
    printed = []
    for block in blocks(page, "python"):
        block = block.replace('"plan.json"}', '"plan.json", "inner": "eager"}')
        exec(compile(block, page.name, "exec"), names)  # noqa: S102 - our own page
        printed.append(capsys.readouterr().out)
    if page.name == "export.md":
        check_export(names, printed)
    if page.name == "usage.md":
        requests = adaskip_compile.report(names["model"]).requests
        assert [len(request.skipped) for request in requests] == [8, 8, 8]  # the first of them before PyTorch's door


def check_export(names: dict[str, Any], printed: list[str]) -> None:
    """Hold the loop that the page spells out to the runner's."""
    assert "skips 2 sublayers" in printed[0]
    chosen = names["runner"].generate(names["ids"], 32)[0]
    assert "".join(names["tokenizer"].decode(token) for token in chosen) == printed[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]):
    for line in "".join(blocks(page, "sh")).splitlines():
        program, command, *rest = shlex.split(line)
        if program != "adaskip":
            continue
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, *rest, "--help"])
        known = capsys.readouterr().out
        assert all(flag in known for flag in rest if flag.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert [target for target in targets if not page.parent.joinpath(target).exists()] == []
