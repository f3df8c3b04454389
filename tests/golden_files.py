"""Comparison with texts kept under ``tests/golden``; ``EXPECTTEST_ACCEPT=1`` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def assert_golden(name: str, text: str) -> None:
    """Fail unless ``text`` equals the file ``tests/golden/<name>.txt`` (one final newline apart)."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    assert path.exists(), f"{path} is missing; run with EXPECTTEST_ACCEPT=1 to write it"
    assert text + "\n" == path.read_text()
