"""The frame that the rest relies on: what is installed, what types are checked, what CI runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WRONG = """
from adaskip_passes.ir.graph import fake_tensor

shape: str = fake_tensor(None)
"""


def test_the_backend_is_found_by_its_entry_point():
    [backend] = metadata.entry_points(group="torch_dynamo_backends", name="adaskip")
    assert backend.value == "adaskip_compile.backend:adaskip"
    assert callable(backend.load())


def test_the_console_script_is_the_command_line():
    [script] = metadata.entry_points(group="console_scripts", name="adaskip")
    assert script.value == "adaskip_compile.cli:main"


def test_wrong_types_are_noticed(tmp_path: Path):
    pyrefly = shutil.which("pyrefly", path=str(Path(sys.executable).parent))
    if pyrefly is None:
        pytest.skip("pyrefly is not installed")
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [pyrefly, "check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path / "wrong.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert re.search(
        r"`\w+ \| None` is not assignable to `str`", found.stdout + found.stderr
    )  # versions differ in the first word


def test_ci_runs_what_make_check_runs():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make check"
