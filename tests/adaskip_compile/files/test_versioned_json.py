"""Files are written whole or not at all, and a file that is not what was asked for is refused with its remedy."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_compile.files import versioned_json
from adaskip_compile.files.versioned_json import DocumentFormat
from adaskip_passes.errors import DamagedFileError, FileError, MissingFileError, NewerFileError

RECIPE = DocumentFormat("test-recipe", 2, remedy="bake one")
PAYLOAD: dict[str, Any] = {
    "name": "Grüße",
    "steps": [{"at": 0.1, "do": None}, {"at": 3, "do": True}],
    "weights": [1, 2],
}

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a document's envelope; an entry set to None is removed."""
    document = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in document.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"
    RECIPE.write(path, PAYLOAD)
    return path


def test_reads_back_what_was_written(recipe: Path) -> None:
    assert RECIPE.read(recipe) == PAYLOAD
    assert RECIPE.read(str(recipe)) == PAYLOAD


@settings(deadline=None)  # it writes files
@given(payload=st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_any_payload_survives_the_trip(payload: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    RECIPE.write(path, payload)
    assert repr(RECIPE.read(path)) == repr(payload), "values keep their types, their digits and the sign of zero"


def test_text_is_for_people(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["{", '  "format": "test-recipe",', '  "version": 2,']
    assert lines[3].startswith('  "producer": "adaskip-compile')
    assert lines[4].startswith('  "checksum": "sha256:')
    assert lines[5:] == [
        '  "payload": {',
        '    "name": "Grüße",',
        '    "steps": [',
        '      {"at": 0.1, "do": null},',
        '      {"at": 3, "do": true}',
        "    ],",
        '    "weights": [1, 2]',
        "  }",
        "}",
    ]


def test_line_ends_and_indentation_do_no_harm(recipe: Path) -> None:
    recipe.write_bytes(recipe.read_bytes().replace(b"\n", b"\r\n").replace(b"  ", b"\t"))
    assert RECIPE.read(recipe) == PAYLOAD


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    with pytest.raises(MissingFileError) as caught:
        RECIPE.read(path)
    assert str(caught.value) == f"{path} does not exist; to get one, bake one"
    assert isinstance(caught.value, FileNotFoundError)


def test_truncated_file_at_every_length(recipe: Path) -> None:
    data = recipe.read_bytes().rstrip()
    for length in range(len(data)):
        recipe.write_bytes(data[:length])
        with pytest.raises(DamagedFileError) as caught:
            RECIPE.read(recipe)
        assert str(caught.value).startswith(f"{recipe} is not a usable test-recipe: it is empty, truncated or not JSON")
        assert str(caught.value).endswith("to get a good one, bake one")


@pytest.mark.parametrize(
    "data", [b"\x80\x04\x95", b"\xff\xfe", b"[" * 100_000, b"[1, 2]", b"null", b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_files_that_are_no_documents(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(
        DamagedFileError, match=r"bad\.json is not a usable test-recipe: .*; to get a good one, bake one"
    ):
        RECIPE.read(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_when_read(recipe: Path, number: str) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("0.1", number), encoding="utf-8")
    with pytest.raises(DamagedFileError, match=number):
        RECIPE.read(recipe)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_when_written(recipe: Path, number: float) -> None:
    with pytest.raises(FileError) as caught:
        RECIPE.write(recipe, {"steps": [{"at": number}]})
    assert str(caught.value) == f"{recipe} was not written: test-recipe files hold no NaN and no infinity"
    assert RECIPE.read(recipe) == PAYLOAD


def test_changed_value_fails_the_checksum(recipe: Path) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("0.1", "0.2"), encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"does not match its checksum \(it was damaged, or edited by hand\)"):
        RECIPE.read(recipe)


def test_newer_version(recipe: Path) -> None:
    # A newer version may compute its checksum in another way: the version is judged first.
    rewrite(recipe, version=3, producer="adaskip-compile 9.1", checksum="blake3:00")
    with pytest.raises(NewerFileError) as caught:
        RECIPE.read(recipe)
    message = str(caught.value)
    assert message.startswith(
        f"{recipe} is of version 3 of the format test-recipe, written by adaskip-compile 9.1; adaskip-compile"
    )
    assert message.endswith("reads up to version 2: upgrade with `pip install --upgrade adaskip-compile`")


def test_older_version_is_read(recipe: Path) -> None:
    rewrite(recipe, version=1)
    assert RECIPE.read(recipe) == PAYLOAD


@pytest.mark.parametrize("version", [0, -1, True, "2", 2.0, None])
def test_senseless_version(recipe: Path, version: object) -> None:
    rewrite(recipe, version=version)
    with pytest.raises(DamagedFileError, match="its version is"):
        RECIPE.read(recipe)


def test_another_kind_of_file(recipe: Path) -> None:
    with pytest.raises(FileError) as caught:
        DocumentFormat("test-menu", 1, remedy="cook one").read(recipe)
    assert str(caught.value) == f"{recipe} is of format test-recipe, and test-menu is needed; to get one, cook one"


@pytest.mark.parametrize(
    ("entry", "reason"), [("format", 'no "format"'), ("payload", "no payload"), ("checksum", "checksum")]
)
def test_envelope_that_lacks_an_entry(recipe: Path, entry: str, reason: str) -> None:
    rewrite(recipe, **{entry: None})
    with pytest.raises(DamagedFileError, match=reason):
        RECIPE.read(recipe)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_write_leaves_the_old_file_whole(recipe: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = recipe.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], interrupt)
    with pytest.raises(KeyboardInterrupt):
        RECIPE.write(recipe, {"new": "content"})
    assert recipe.read_bytes() == before
    assert list(recipe.parent.iterdir()) == [recipe], "no litter beside it"


def test_new_content_is_complete_before_it_takes_the_place(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    replace = Path.replace

    def watch(draft: Path, target: Path) -> Path:
        seen.append(RECIPE.read(draft))
        assert RECIPE.read(target) == PAYLOAD
        return replace(draft, target)

    monkeypatch.setattr(Path, "replace", watch)
    RECIPE.write(recipe, {"new": "content"})
    assert seen == [{"new": "content"}] == [RECIPE.read(recipe)]


def test_full_disk_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError) as caught:
        RECIPE.write(recipe, {"new": "content"})
    assert str(caught.value) == f"{recipe} was not written: No space left on device"
    assert RECIPE.read(recipe) == PAYLOAD


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "recipe.json"
    RECIPE.write(path, PAYLOAD)
    assert RECIPE.read(path) == PAYLOAD


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="was not written: it exists and is not a regular file"):
        RECIPE.write(tmp_path, PAYLOAD)
    with pytest.raises(FileError, match="cannot be read"):
        RECIPE.read(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file modes, links and pipes")
class TestPosix:
    def test_mode_follows_the_umask_and_then_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.json"
        old = os.umask(0o027)
        try:
            RECIPE.write(path, PAYLOAD)
            assert stat.S_IMODE(path.stat().st_mode) == 0o640
            path.chmod(0o600)
            RECIPE.write(path, PAYLOAD)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        finally:
            os.umask(old)

    def test_a_link_stays_a_link(self, recipe: Path) -> None:
        link = recipe.with_name("link.json")
        link.symlink_to(recipe)
        RECIPE.write(link, {"new": "content"})
        assert link.is_symlink()
        assert RECIPE.read(recipe) == {"new": "content"}

    def test_a_pipe_is_not_replaced(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with pytest.raises(FileError, match="not a regular file"):
            RECIPE.write(pipe, PAYLOAD)
        assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_producer_names_the_package() -> None:
    assert versioned_json.producer().split()[0] == "adaskip-compile"
