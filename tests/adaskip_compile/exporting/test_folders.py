"""A folder is written whole or not at all, and nothing that is not an export is ever lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import adaskip_compile
from adaskip_compile import FileError
from adaskip_compile.exporting.folders import EXPORT_FORMAT, MANIFEST, check_folder, whole_folder
from tests.models import tiny


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_export(folder: Path, note: str) -> None:
    with whole_folder(check_folder(folder)) as draft:
        (draft / "program.pt2").write_text(note)
        EXPORT_FORMAT.write(draft / MANIFEST, {"note": note})


def test_an_export_is_put_in_place_and_an_earlier_one_goes(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        for note in ("first", "second"):
            write_export(folder, note)
            assert (folder / "program.pt2").read_text() == note
            assert EXPORT_FORMAT.read(folder / MANIFEST) == {"note": note}
            assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("no"), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("earlier", [False, True])
def test_on_failure_all_is_as_it_was(failure, earlier, tmp_path):
    if earlier:
        write_export(tmp_path / "out", "earlier")
    before = snapshot(tmp_path)
    with pytest.raises(FileError if isinstance(failure, OSError) else type(failure)):  # noqa: PT012, SIM117
        with whole_folder(tmp_path / "out") as draft:
            (draft / "program.pt2").write_text("half")
            raise failure
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])


def test_what_is_no_export_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / MANIFEST).write_text('{"format": "another"}')
    before = snapshot(tmp_path)
    with pytest.raises(FileError, match="file is a file; name a folder"):
        adaskip_compile.export(tiny("llama"), None, tmp_path / "file")
    with pytest.raises(FileError, match="folder is a folder with other things in it"):
        adaskip_compile.export(tiny("llama"), None, tmp_path / "folder")
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="was not written"), whole_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore"), FileError),
        (OSError(errno.ENOSPC, "No space left on device"), FileError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_full_disk_or_an_interrupt_leaves_nothing(failure, raised, tmp_path, monkeypatch):
    save = torch.export.save
    calls: list[Path] = []

    def failing(program, path):
        calls.append(path)
        if len(calls) == 2:
            raise failure
        save(program, path)

    monkeypatch.setattr(torch.export, "save", failing)
    with pytest.raises(raised) as caught:
        adaskip_compile.export(tiny("llama"), None, tmp_path / "out", max_length=32)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []
    if raised is FileError:
        assert "was not written" in str(caught.value)
        assert "\n" not in str(caught.value)
