"""The documentation builds as a site, without a warning: no dead link, and every public name and command is on it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import adaskip_compile
from adaskip_compile.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def test_it_builds_strictly_and_holds_everything(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the site needs the docs extra")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-b", "html", "-c", "docs", "."]
    made = subprocess.run([*build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    reference = (tmp_path / "docs" / "python.html").read_text()
    for name in adaskip_compile.__all__:
        home = getattr(adaskip_compile, name).__module__
        assert any(f'id="{path}.{name}"' in reference for path in ("adaskip_compile", home)), name
    for option in fields(adaskip_compile.Options):
        assert re.search(rf'id="adaskip_compile\.(options\.)?Options\.{option.name}"', reference), option.name
    assert "`" not in re.sub(r"<[^>]+>", "", reference), "a docstring's marks are shown as they are"
    commands = (tmp_path / "docs" / "commands.html").read_text()
    for command in COMMANDS:
        assert f"adaskip {command.__name__.rpartition('.')[2]}" in commands
