"""An inspection as one self-contained page: it needs no network, no server and no other file."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from adaskip_compile.files.versioned_json import producer

# In this order: each script uses what those before it define.
_SCRIPTS = ("costs.js", "charts.js", "sections.js", "history.js", "page.js")


def inspection_page(report: dict[str, Any]) -> str:
    """Return the HTML of a page about ``report``, as :func:`adaskip_compile.inspection.report.inspection_report` gave it."""
    folder = resources.files("adaskip_compile.inspection") / "page"
    data = json.dumps({**report, "producer": producer()}, separators=(",", ":"), allow_nan=False)
    parts = {
        "__TITLE__": html.escape(str(report["model"])),
        "__STYLE__": (folder / "page.css").read_text("utf-8"),
        # A closing tag or a comment inside the data must not end the script element.
        "__REPORT__": data.replace("<", "\\u003c"),
        "__SCRIPT__": "\n".join((folder / name).read_text("utf-8").replace('"use strict";\n', "") for name in _SCRIPTS),
    }
    page = (folder / "page.html").read_text("utf-8")
    for place, content in parts.items():
        before, _, after = page.partition(place)
        page = before + content + after
    return page
