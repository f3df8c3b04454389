from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaskip_compile.evaluation.domains import folder_domain, mixed_windows, read_domains
from adaskip_passes.errors import FileError, MissingFileError, OptionError
from tests.made_up_texts import made_up_domain, made_up_folder
from tests.tiny_checkpoints import byte_tokenizer


@pytest.mark.parametrize("files", [2, 3, 8])
def test_a_folder_is_split_by_file_into_halves(files: int, tmp_path: Path):
    for index in range(files):
        (tmp_path / f"{index}.txt").write_text(f"file {index}")
    (tmp_path / ".hidden").write_text("hidden")
    domain = folder_domain("numbers", tmp_path)
    profiling, evaluation = (set(half.split("\n\n")) for half in (domain.profiling, domain.evaluation))
    assert profiling | evaluation == {f"file {index}" for index in range(files)}
    assert not profiling & evaluation
    assert len(evaluation) == files // 2


def test_the_split_depends_on_names_alone(tmp_path: Path):
    for place in ("here", "there"):
        (tmp_path / place / "inner").mkdir(parents=True)
        for name in ("a.txt", "b.txt", "inner/c.txt"):
            (tmp_path / place / name).write_text(name)
    assert folder_domain("x", tmp_path / "here") == folder_domain("x", tmp_path / "there")


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        (["news"], OptionError, "--texts news: takes NAME=DIR"),
        (["news={tmp}/none"], MissingFileError, "there is no such folder"),
        (["news={tmp}"], OptionError, "holds 1 text files, and 2 are needed"),
        (["code={tmp}"], OptionError, "there is a domain 'code' already"),
    ],
)
def test_texts_that_make_no_domain_are_refused(
    entries: list[str], error: type[Exception], message: str, tmp_path: Path
):
    (tmp_path / "only.txt").write_text("text")
    with pytest.raises(error, match=message):
        read_domains([entry.format(tmp=tmp_path) for entry in entries])


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FileError, match=r"b\.bin: not a text file in UTF-8"):
        folder_domain("x", tmp_path)


def test_domains_are_the_built_in_ones_and_those_given(tmp_path: Path):
    domains = read_domains([f"sea={made_up_folder(tmp_path / 'sea', 'sea')}"])
    assert [domain.name for domain in domains] == ["english", "code", "sea"]


def test_windows_are_full_however_dense_the_text_is():
    domain, tokenizer = made_up_domain("sea"), byte_tokenizer()
    windows = domain.windows(tokenizer, "evaluation", 2, 100)
    assert [len(window) for window in windows] == [100, 100]
    assert all(tokenizer.decode(window) in domain.evaluation for window in windows)

    class Dense:
        """Ten characters a token: six a token are too few."""

        def __call__(self, text: str, **_: object):
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=list(range(len(text) // 10)))

    assert [len(window) for window in domain.windows(Dense(), "evaluation", 2, 50)] == [50, 50]
    with pytest.raises(OptionError, match="evaluation \\(sea\\) texts"):
        domain.windows(tokenizer, "evaluation", 10, 1000)


def test_mixed_windows_take_turns():
    sea, city = made_up_domain("sea"), made_up_domain("city")
    tokenizer = byte_tokenizer()
    mixed = mixed_windows([sea, city], tokenizer, "profiling", 3, 64)
    first, second = (domain.windows(tokenizer, "profiling", 2, 64) for domain in (sea, city))
    assert torch.stack(mixed).tolist() == torch.stack([first[0], second[0], first[1]]).tolist()
