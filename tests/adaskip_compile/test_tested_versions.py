"""The versions that were tested: what errors say of them, and that the constraints install them."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from adaskip_compile.tested_versions import TESTED, internals_of
from adaskip_passes.errors import CaptureError

ROOT = Path(__file__).parents[2]


def test_an_internal_that_is_gone_is_an_error_that_names_versions():
    with pytest.raises(CaptureError) as raised, internals_of("torch", "export"):
        from torch import no_such_thing  # type: ignore[attr-defined]  # noqa: F401
    said = str(raised.value)
    assert "export needs" in said
    assert "no_such_thing" in said
    assert metadata.version("torch") in said
    assert TESTED["torch"][-1] in said


@pytest.mark.parametrize(("file", "place"), [("constraints-oldest.txt", 0), ("constraints.txt", 1)])
@pytest.mark.parametrize("library", sorted(TESTED))
def test_the_constraints_are_versions_that_are_tested(file: str, place: int, library: str):
    [pinned] = re.findall(rf"^{library}==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
    assert pinned == TESTED[library][place]


@pytest.mark.parametrize("library", sorted(TESTED))
def test_the_page_of_support_names_them_all(library: str):
    page = (ROOT / "docs" / "support.md").read_text()
    assert all(version in page for version in TESTED[library])
