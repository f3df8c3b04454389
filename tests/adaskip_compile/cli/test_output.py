from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaskip_compile.cli.output import Output, add_row, new_table
from adaskip_passes.errors import FileError


def test_words_go_to_standard_output(capsys: pytest.CaptureFixture[str]):
    output = Output()
    output.say("hello")
    output.results({"number": 1})
    assert capsys.readouterr() == ("hello\n", "")


def test_json_has_standard_output_to_itself(capsys: pytest.CaptureFixture[str]):
    output = Output("-")
    output.say("hello")
    output.results({"number": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"number": 1}
    assert err == "hello\n"


def test_json_goes_to_a_file_beside_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = Output(str(tmp_path / "results.json"))
    output.say("hello")
    output.results({"number": 1})
    assert json.loads((tmp_path / "results.json").read_text()) == {"number": 1}
    assert capsys.readouterr().out == "hello\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"--json .*file/results\.json: cannot be written \(Not a directory\)"):
        Output(str(tmp_path / "file" / "results.json")).results({})


def test_nobody_is_shown_a_progress_bar_when_output_is_piped():
    assert not Output().watched
    assert not Output("-").watched


def test_tables_show_brackets_and_long_paths_as_they_are(capsys: pytest.CaptureFixture[str]):
    path = "model.language_model.decoder.layers[3].block_sparse_moe.experts_and_router"
    table = new_table("title", "sublayer", "number")
    add_row(table, path, 3)
    Output().show(table)
    assert path in capsys.readouterr().out
