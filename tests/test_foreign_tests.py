"""The bench that runs other people's tests: what it says of tests that pass, fail, kill their process, or mind us."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench import foreign_page, foreign_tests

TESTS = """
import os, sys, unittest

import pytest


def test_passes():
    assert True


def test_fails():
    raise ValueError("always")


@pytest.mark.skip(reason="not now")
def test_skipped():
    pass


def test_minds_us():
    assert "adaskip_compile" not in sys.modules


def test_kills_its_process():
    os._exit(7)


class Last(unittest.TestCase):
    def test_passes(self):
        pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> foreign_tests.Suite:
    folder = tmp_path / "tests" / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "test_modeling_tiny.py").write_text(TESTS)
    (tmp_path / "src" / "transformers").mkdir(parents=True)
    (tmp_path / "src" / "transformers" / "__init__.py").write_text('__version__ = "1.2.0.dev0"\n')
    return foreign_tests.Suite("transformers", tmp_path, "models", "", 60)


@pytest.mark.slow
def test_what_fails_only_with_us_is_told_from_what_fails_anyway(suite: foreign_tests.Suite):
    row = foreign_tests.run_file(suite, "tiny")
    assert (row.passed, row.failed) == (3, 2)
    assert (row.passed_with, row.failed_with) == (2, 3)
    [(test, reason)] = row.only_with_us
    assert test.endswith("::test_minds_us")
    assert "adaskip_compile" in reason
    assert row.not_again == ()


def test_a_file_that_the_checkout_lacks_is_said(suite: foreign_tests.Suite):
    assert foreign_tests.run_file(suite, "other").problem == "not in the checkout"


def test_the_version_of_a_checkout_is_read(suite: foreign_tests.Suite, tmp_path: Path):
    assert foreign_tests.checkout_version(suite) == "1.2.0.dev0"
    assert foreign_tests.checkout_version(foreign_tests.Suite("torch", tmp_path, "process", "", 60)) is None


def test_the_page_has_a_row_a_file_and_names_what_fails_only_with_us(tmp_path: Path):
    row = foreign_page.Row("torch", "misc", 9, 1, 8, 2, only_with_us=(("a::b", "TypeError: c"),), not_again=("d::e",))
    run = {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11", "date": "2026-01-02", "select": "x"}
    foreign_page.write_run(tmp_path / "foreign_tests_one.json", {**run, "sources": {}, "notes": []}, [row])
    text = foreign_page.page(tmp_path)
    assert "9 tests pass without us; of these 1 fail only with us." in text
    assert "| torch | misc | 9 | 1 | 8 | 2 | 1 | 1 |" in text
    assert "- `a::b`: TypeError: c" in text
