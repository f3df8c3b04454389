"""The command ``adaskip export``: what it writes and says, and what it refuses before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adaskip_compile import SkipPlan
from adaskip_compile.cli import main
from adaskip_compile.exporting.runner import ExportedModel, read_manifest
from tests.adaskip_compile.exporting.exports import run_alone
from tests.tiny_checkpoints import save_tiny

PLAN = replace(SkipPlan.from_scales({"model.layers.0.self_attn": 0.98, "model.layers.1.mlp": 0.95}, window=3), beta=0.9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def plan(tmp_path: Path) -> str:
    PLAN.save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


def test_it_writes_programs_and_says_how_to_run_them(
    model: str, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    arguments = ["export", model, "--plan", plan, "--out", str(out), "--max-length", "64", "--batch", "2"]
    assert main([*arguments, "--json", "-"]) == 0
    printed, said = capsys.readouterr()
    found = json.loads(printed)
    assert found["directory"] == str(out)
    assert {key: found[key] for key in read_manifest(out)} == read_manifest(out)
    assert (found["max_length"], found["batch"], found["aot"]) == (64, 2, None)
    assert "skips 2 sublayers" in said
    assert "note: the plan's window is not built in" in said
    assert f"written to {out}" in said
    assert ExportedModel(out).manifest["programs"]["decode"]["skipped"] == PLAN.scales
    [line] = [line for line in said.splitlines() if line.startswith("next: python ")]
    _, _, script, *flags = line.split()
    ran = run_alone(Path(script), *flags, "--new-tokens", 5, "--ignore-end")
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) == 5


def test_bad_input_is_one_line_and_2(model: str, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full, out = tmp_path / "full", tmp_path / "out"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    (tmp_path / "broken.json").write_text("{")
    for arguments, message in (
        ([model, "--plan", plan, "--out", str(full)], "is a folder with other things in it"),
        ([model, "--plan", str(tmp_path / "none.json"), "--out", str(out)], "none.json does not exist"),
        ([model, "--plan", str(tmp_path / "broken.json"), "--out", str(out)], "is not a usable adaskip-plan"),
        (["/no/such/model", "--plan", plan, "--out", str(out)], "there is no such file or folder"),
        ([model, "--plan", plan, "--out", str(out), "--max-length", "3"], "max_length=3: takes a number of tokens"),
        ([model, "--plan", plan, "--out", str(out), "--batch", "0"], "batch=0: takes a number of rows"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("adaskip: error: ")
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
