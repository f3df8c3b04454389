from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from adaskip_compile.cli import main
from tests.tiny_checkpoints import save_tiny


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache directory with two captures of one model, a checkpoint, and a file of somebody else's."""
    monkeypatch.setenv("ADASKIP_CACHE_DIR", str(tmp_path))
    for file, size in {
        "captures/model/a.capture": 1000,
        "captures/model/b.capture": 500,
        "checkpoints/one/model.safetensors": 4000,
        "checkpoints/one.lock": 0,
        "notes.txt": 7,
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(bytes(size))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    assert main(["cache", *arguments, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    return {one["kind"]: (one["count"], one["bytes"]) for one in found["kept"]}, err


def test_the_table_tells_numbers_and_room(kept: Path, capsys: pytest.CaptureFixture[str]):
    os.utime(kept / "checkpoints/one/model.safetensors", (0, 0))
    found, words = run(capsys)
    assert found == {"captures": (1, 1500), "checkpoints": (1, 4000), "plans": (0, 0), "profiles": (0, 0)}
    assert str(kept) in words
    assert "today" in words
    assert "days ago" in words


def test_one_kind_is_cleared(kept: Path, capsys: pytest.CaptureFixture[str]):
    found, words = run(capsys, "--clear", "captures")
    assert found == {"captures": (1, 1500)}
    assert "removed" in words
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoints", "notes.txt"]


def test_all_is_cleared_but_what_is_not_ours(kept: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys, "--clear")
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
    assert run(capsys)[0]["captures"] == (0, 0)


def test_a_directory_that_is_not_there_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ADASKIP_CACHE_DIR", str(tmp_path / "none"))
    assert set(run(capsys, "--clear")[0].values()) == {(0, 0)}
    assert not (tmp_path / "none").exists()


def test_what_commands_keep_is_of_a_kind_that_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ADASKIP_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()  # nothing is kept with some versions of torch
    model = str(save_tiny(tmp_path / "model", num_hidden_layers=2))
    assert main(["run", model, "--prompt", "word", "--max-new-tokens", "3", "--inner", "eager"]) == 0
    capsys.readouterr()
    listed = run(capsys)[0]
    # Tests keep captures in folders of their own, "captures-..." (tests/conftest.py).
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()} <= set(listed)


def test_what_an_interrupted_removal_has_left_goes_too(kept: Path, capsys: pytest.CaptureFixture[str]):
    (kept / "captures-abc.removed" / "captures").mkdir(parents=True)
    run(capsys, "--clear", "captures")
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoints", "notes.txt"]


def test_what_is_just_being_made_is_left_alone(kept: Path, capsys: pytest.CaptureFixture[str]):
    with FileLock(kept / "checkpoints" / "one.lock"):
        assert main(["cache", "--clear", "checkpoints"]) == 2
    assert "one: another process is just making it" in capsys.readouterr().err
    assert (kept / "checkpoints" / "one" / "model.safetensors").exists()


def test_a_folder_that_lies_elsewhere_is_emptied_there(
    kept: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "checkpoints"
    (kept / "checkpoints").rename(elsewhere)
    (kept / "checkpoints").symlink_to(elsewhere)
    assert run(capsys, "--clear", "checkpoints")[0] == {"checkpoints": (1, 4000)}
    assert not elsewhere.exists()
