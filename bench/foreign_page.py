"""The kept page of :mod:`bench.foreign_tests`, made from what is kept of each run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """How one file of tests went; tests that failed only with us by name, with what they said."""

    suite: str
    name: str
    passed: int = 0
    failed: int = 0
    passed_with: int = 0
    failed_with: int = 0
    graphs: int = 0
    unskipped: tuple[str, ...] = ()
    only_with_us: tuple[tuple[str, str], ...] = ()
    not_again: tuple[str, ...] = ()
    problem: str = ""


def write_run(path: Path, about: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Keep a run: what is true of all of it, and its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def read_run(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return what :func:`write_run` kept."""
    about = json.loads(path.read_text())
    return about, [Row(**row) for row in about.pop("rows")]


def page(folder: Path) -> str:
    """Return the page: a table for each pair of versions that has been run."""
    runs = [read_run(path) for path in sorted(folder.glob("foreign_tests_*.json"))]
    rows = [row for _, some in runs for row in some]
    only = sum(len(row.only_with_us) for row in rows)
    lines = [
        "# Other people's tests, without us and with us",
        "",
        f"{sum(row.passed for row in rows)} tests pass without us; of these {only or 'none'} fail only with us.",
        "",
        "With us, the models of transformers' tests are compiled in place with a plan that skips nothing, or by our backend where a",
        "test compiles them itself; torch's tests run in a process in which a model was compiled and run before.",
        "",
        "`fails only with us` counts what passed without us, failed with us, and did both again when it was run alone;",
        "`not again` what failed with us in its file and not alone, or failed alone on both sides too. `graphs` is how many",
        "captured graphs of ours the file's models ran in. Tests that the project skips, or expects to fail, are not counted.",
    ]
    for about, some in runs:
        lines += ["", *_section(about, some)]
    return "\n".join(lines) + "\n"


def _section(run: dict[str, Any], rows: list[Row]) -> Iterator[str]:
    yield f"## torch {run['torch']}, transformers {run['transformers']}"
    yield ""
    yield f"{run['date']}, Python {run['python']}, CPU. `python -m bench.foreign_tests --transformers DIR --torch DIR`."
    for name, said in run["sources"].items():
        yield f"{name}: {said}."
    yield from run["notes"]
    yield f"Of transformers' tests: `-k '{run['select']}'`."
    yield ""
    yield "| project | file | passed | failed | passed with us | failed with us | fails only with us | not again | graphs | notes |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        notes = "; ".join([row.problem, *row.unskipped]).strip("; ").replace("|", "/")
        counts = (row.passed, row.failed, row.passed_with, row.failed_with, len(row.only_with_us), len(row.not_again))
        graphs = row.graphs if row.suite == "transformers" else ""
        yield f"| {row.suite} | {row.name} | {' | '.join(map(str, counts))} | {graphs} | {notes} |"
    for row in rows:
        for test, reason in row.only_with_us:
            yield f"\n- `{test}`: {reason}"
