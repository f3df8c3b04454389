"""Where Dynamo breaks a forward in pieces: what errors tell of it that need the forward as one graph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch._dynamo import utils


class GraphBreaks:
    """The graph breaks of this process from the time that this is made."""

    def __init__(self) -> None:
        self._before = len(utils.graph_break_reasons)

    def first(self) -> str:
        """Return where capture stopped first and why, as the end of a sentence; how to see it where Dynamo has not said."""
        reasons = utils.graph_break_reasons[self._before :]
        if not reasons:
            return "TORCH_LOGS=graph_breaks shows where it breaks"
        return f"it breaks first at: {break_text(reasons[0])}"


def break_text(stop: Any) -> str:
    """Return why and where capture stopped, of what Dynamo records of a graph break."""
    place = f" ({_place(stop.user_stack[-1].filename, stop.user_stack[-1].lineno)})" if stop.user_stack else ""
    return _line(stop.reason) + place


def why_not_captured(error: Exception) -> str:
    """Return what ``error`` of Dynamo says of a forward that it cannot capture, with the file and line that it names last."""
    text = str(error)
    places = re.findall(r'File "([^"]+)", line (\d+)', text.partition("from user code")[2])
    return _line(text) + (f" ({_place(*places[-1])})" if places else "")


def _line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _place(file: str, line: int | str | None) -> str:
    return f"{Path(file).name}:{line}"
