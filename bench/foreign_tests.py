"""Do other people's tests pass with us? Writes ``results/foreign_tests.md``, one row a file of tests.

Takes a checkout of transformers and one of torch (or what their source distributions hold), runs transformers' generation
tests of model families and torch's Dynamo tests, each without us and with us, and says which fail only with us: the exit
status is then 1. With us, the models of transformers' tests are compiled in place with a plan that skips nothing, or by our
backend where a test compiles them itself; torch's tests run in a process in which a model was compiled and run before. What
fails with us alone is run once more, by itself, on both sides.

    python -m bench.foreign_tests --transformers DIR --torch DIR [--families llama ...] [--files test_misc ...]

The tests themselves need pytest, parameterized, expecttest and httpx. What has been run is kept in ``results/kept`` and not
run again, unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from bench.foreign_page import Row, page, read_run, write_run

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
FAMILIES = (
    "llama qwen2 qwen3 gemma3 mistral mixtral phi3 gpt2 gpt_neox opt bloom mamba cohere olmo2 gpt_oss falcon_h1 qwen3_moe"
).split()
FILES = (
    "activation_checkpointing aot_autograd_cache callback compiler_bisector ctx_manager debug_utils deviceguard "
    "error_messages export functions higher_order_ops logging misc modes package recompiles regional_inductor repros "
    "streams structured_trace subclasses trace_rules utils wrap_inductor_compiled_regions"
).split()
# What Inductor makes of whole models takes most of a minute a family, and is not ours.
GENERATION = "(generate or cache or beam or assisted or lookup or left_padding) and not compilation_all_outputs"
FILE_SECONDS = 3 * 3600


@dataclass(frozen=True)
class Suite:
    """One project's tests: where they are, which of them, and how we are brought in."""

    name: str
    checkout: Path
    way: str
    select: str
    test_seconds: int

    def file(self, name: str) -> Path:
        """Return the file of a family, or of that name, from the top of the checkout on."""
        if self.name == "transformers":
            return Path(f"tests/models/{name}/test_modeling_{name}.py")
        return Path(f"test/dynamo/test_{name.removeprefix('test_')}.py")


def main() -> None:
    """Run what is asked for and not kept yet, write the page, and fail where something fails only with us."""
    arguments = _arguments()
    kept = Kept(arguments)
    for suite, names in _suites(arguments):
        print(f"{suite.name}: {kept.say_source(suite)}", flush=True)
        for name in names:
            if arguments.again or (suite.name, name) not in kept.rows:
                row = run_file(suite, name)
                kept.add(row)
                print(_line(row), flush=True)
    arguments.page.write_text(page(kept.folder))
    sys.exit(any(row.only_with_us for row in kept.rows.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transformers", type=Path, metavar="DIR", help="a checkout of transformers, for its tests")
    parser.add_argument("--torch", type=Path, metavar="DIR", help="a checkout of torch, for its tests")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="model families of transformers")
    parser.add_argument("--files", nargs="+", default=FILES, help="files of torch's test/dynamo")
    parser.add_argument("--select", default=GENERATION, metavar="EXPR", help="which of transformers' tests, as for -k")
    parser.add_argument(
        "--test-seconds", type=int, default=300, metavar="N", help="a test that takes longer has failed"
    )
    parser.add_argument(
        "--note", action="append", default=[], help="what the page shall say of where the tests are from"
    )
    parser.add_argument("--again", action="store_true", help="run again what has been run")
    parser.add_argument("--page", type=Path, default=RESULTS / "foreign_tests.md", metavar="FILE")
    arguments = parser.parse_args()
    if not (arguments.transformers or arguments.torch):
        parser.error("give --transformers DIR, --torch DIR, or both")
    return arguments


def _suites(arguments: argparse.Namespace) -> Iterator[tuple[Suite, list[str]]]:
    seconds = arguments.test_seconds
    if arguments.transformers:
        checkout = arguments.transformers.resolve()
        yield Suite("transformers", checkout, "models", arguments.select, seconds), arguments.families
    if arguments.torch:
        yield Suite("torch", arguments.torch.resolve(), "process", "", seconds), arguments.files


class Kept:
    """What has been run with these versions: a file of JSON that is written after each file of tests."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder = RESULTS / "kept"
        versions = {name: _installed(name) for name in ("torch", "transformers")}
        self._path = self.folder / f"foreign_tests_torch{versions['torch']}_transformers{versions['transformers']}.json"
        self._about: dict[str, Any] = {**versions, "python": platform.python_version(), "sources": {}}
        self.rows: dict[tuple[str, str], Row] = {}
        if self._path.exists():
            known, rows = read_run(self._path)
            self._about["sources"] = known["sources"]
            self.rows = {(row.suite, row.name): row for row in rows}
        self._about |= {"notes": arguments.note, "select": arguments.select}

    def say_source(self, suite: Suite) -> str:
        """Keep and return what the checkout says of its version, beside the version that is installed."""
        found, installed = checkout_version(suite), _installed(suite.name)
        if found is None:
            said = f"the checkout says no version, {installed} is installed"
        elif Version(found).release == Version(installed).release:
            said = f"the checkout is of {found}, as is what is installed"
        else:
            said = f"THE CHECKOUT IS OF {found}, and {installed} is installed"
        self._about["sources"][suite.name] = said
        return said

    def add(self, row: Row) -> None:
        """Keep one more."""
        self.rows[row.suite, row.name] = row
        self._about["date"] = datetime.date.today().isoformat()
        write_run(self._path, self._about, (row for _, row in sorted(self.rows.items())))


def checkout_version(suite: Suite) -> str | None:
    """Return the version that a checkout says it is of, or None."""
    says = {
        "transformers": ("src/transformers/__init__.py", r'^__version__ = "([^"]+)"'),
        "torch": ("version.txt", r"^(\S+)"),
    }
    file, pattern = says[suite.name]
    path = suite.checkout / file
    found = re.search(pattern, path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else None


def _installed(name: str) -> str:
    from importlib.metadata import version

    return version(name).partition("+")[0]


def run_file(suite: Suite, name: str) -> Row:
    """Run one file of tests without us and with us, and what failed only with us once more, alone."""
    row = Row(suite.name, name)
    file = suite.file(name)
    if not (suite.checkout / file).exists():
        row.problem = "not in the checkout"
        return row
    without, with_us = (run_tests(suite, [str(file)], way) for way in (None, suite.way))
    row.passed, row.failed = (_count(without, outcome) for outcome in ("passed", "failed"))
    row.passed_with, row.failed_with = (_count(with_us, outcome) for outcome in ("passed", "failed"))
    row.graphs = sum(line.get("graphs", 0) for line in with_us.values())
    row.unskipped = tuple(sorted({reason for line in with_us.values() for reason in line.get("unskipped", ())}))
    for test, before in without.items():
        after = with_us.get(test, {"outcome": "failed", "reason": "did not run"})
        if before["outcome"] == "passed" and after["outcome"] != "passed":
            reason = _again(suite, test, after)
            if reason:
                row.only_with_us += ((test, reason),)
            else:
                row.not_again += (test,)
    return row


def _again(suite: Suite, test: str, before: dict[str, Any]) -> str:
    """Run ``test`` alone, with us and without; return how it failed only with us, or nothing where it did not."""
    alone, without = (run_tests(suite, [test], way).get(test, before) for way in (suite.way, None))
    if alone["outcome"] == "passed" or without["outcome"] != "passed":
        return ""
    return alone.get("reason") or alone["outcome"]


def _count(outcomes: dict[str, dict[str, Any]], outcome: str) -> int:
    return sum(line["outcome"] == outcome for line in outcomes.values())


def run_tests(suite: Suite, tests: Sequence[str], way: str | None) -> dict[str, dict[str, Any]]:
    """Return how each of ``tests`` (files, or names of tests) ended; what kills the process has failed, and the rest goes on."""
    found: dict[str, dict[str, Any]] = {}
    while True:
        lines = list(_run_process(suite, tests, way, skip=found))
        ended = {line["test"]: line for line in lines if "test" in line}
        started = [line["start"] for line in lines if "start" in line and line["start"] not in ended]
        killed = {test: {"outcome": "failed", "reason": "its process ended"} for test in started}
        found |= ended | killed
        if not killed or any("end" in line for line in lines):
            return found


def _run_process(suite: Suite, tests: Sequence[str], way: str | None, skip: Iterable[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="foreign-tests-") as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        plain = [
            "-q",
            "--show-capture=no",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            "-o",
            "log_cli=0",
            "--rootdir",
            str(suite.checkout),
        ]
        ours = ["-p", "bench.foreign_plugin", "--outcomes", str(outcomes), "--test-seconds", str(suite.test_seconds)]
        ours += ["--with-us", way] if way else []
        chosen = ["-k", suite.select] if suite.select and "::" not in tests[0] else []
        chosen += [f"--deselect={test}" for test in skip]
        command = [sys.executable, "-m", "pytest", *plain, *ours, *chosen, *tests]
        how: dict[str, Any] = {"cwd": suite.checkout, "env": _environment(Path(folder))}
        how |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": FILE_SECONDS}
        with contextlib.suppress(subprocess.TimeoutExpired):  # what was running then has no end in the file
            subprocess.run(command, check=False, **how)
        if outcomes.exists():
            yield from map(json.loads, outcomes.read_text().splitlines())


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of both sides: one thread, no GPU, no network, caches of their own, and this tree to import."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "passes")]),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ADASKIP_CACHE_DIR": str(folder / "adaskip"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def _line(row: Row) -> str:
    text = f"{row.suite} {row.name}: without us {row.passed} passed, {row.failed} failed; with us "
    text += (
        f"{row.passed_with} passed, {row.failed_with} failed, {len(row.only_with_us)} only with us, {row.graphs} graphs"
    )
    return "\n  ".join([row.problem or text, *(f"{test}: {reason}" for test, reason in row.only_with_us)])


if __name__ == "__main__":
    main()
