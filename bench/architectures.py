"""Which architectures have their sublayers found and skipped? Writes ``results/architectures.md``, one row a model type.

Every causal language model type of the installed transformers is built tiny and at random, captured once, and checked:
the sublayers against what hooks on the eager model see, the logits with nothing skipped against eager, and those of
random legal plans against the interpreter reference. Types run in batches, each in a process of its own.

    python -m bench.architectures [--plans 3] [--workers 2] [TYPE ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BATCH, SECONDS = 12, 90


def main() -> None:
    """Run all types, or those given, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all that decode text where none is given")
    parser.add_argument("--plans", type=int, default=3, help="random legal plans a type")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--batch", action="store_true", help="check the given types in this process, a JSON line each")
    arguments = parser.parse_args()
    if arguments.batch:
        _check(arguments.types, arguments.plans)
        return
    types = arguments.types or _causal_types()
    rows: dict[str, dict[str, Any]] = {}
    batches = [types[start : start + BATCH] for start in range(0, len(types), BATCH)]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for found in pool.map(_run_batch, batches, [arguments.plans] * len(batches)):
            rows.update(found)
    RESULTS.mkdir(exist_ok=True)
    text = table(rows)
    (RESULTS / "architectures.md").write_text(text)
    print(text.splitlines()[2])


def _causal_types() -> list[str]:
    from tests.architectures import causal_types

    return causal_types()


def _run_batch(types: list[str], plans: int) -> dict[str, dict[str, Any]]:
    """Check ``types`` in one process; where it dies, the others go on in a new one.

    What fails behind others gets a process of its own: what they left in the compiler is not its doing.
    """
    rows = _run(types, plans)
    failed = [family for family in types[1:] if rows[family].get("error")]
    for family in failed:
        rows.update(_run([family], plans))
    return rows


def _run(types: list[str], plans: int) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    while left := [family for family in types if family not in rows]:
        command = [sys.executable, "-m", "bench.architectures", "--batch", "--plans", str(plans), *left]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as done:
            for line in done.stdout or ():
                if line.startswith("{"):
                    row = json.loads(line)
                    rows[row["family"]] = row
                    print(f"{row['family']}: {row['verdict']} {row['reason'] or row['kinds']}", flush=True)
        if left[0] not in rows:
            rows[left[0]] = {"family": left[0], "verdict": "no", "reason": f"its process ended with {done.returncode}"}
    return rows


def _check(types: list[str], plans: int) -> None:
    import torch
    import transformers

    from tests.architecture_checks import Findings, examine, verdict
    from tests.architectures import tiny_architecture

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _out_of_time)
    for family in types:
        signal.alarm(SECONDS)
        error = ""
        try:
            found = examine(family, tiny_architecture(family), plans=plans)
        except Exception as raised:  # noqa: BLE001 whatever one type fails with, the others go on
            error = f"{type(raised).__name__}: {str(raised).splitlines()[0][:160]}"
            found = Findings(family, reason=error)
        signal.alarm(0)
        found.streams = []
        print(json.dumps({**asdict(found), "verdict": verdict(found), "error": error}), flush=True)


def _out_of_time(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the page: how many, and a row a model type."""
    import torch
    import transformers

    yes = sum(row["verdict"] == "yes" for row in rows.values())
    lines = [
        "# Architectures",
        "",
        (
            f"{yes} of {len(rows)} model types: every sublayer found, and skipped as the reference says. "
            f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, CPU, fp32; "
            "`make architectures` regenerates this page."
        ),
        "",
        "A type with `no` runs, unskipped where no sublayer is named; its note says why.",
        "",
        "| type | yes/no | sublayers | kinds | caches | zero-skip parity | skip parity | notes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family, row in sorted(rows.items()):
        cells = (family, row["verdict"], row.get("sublayers", 0), row.get("kinds", ""), row.get("caches", ""))
        lines.append(
            f"| {' | '.join(map(str, cells))} | {row.get('zero', '')} | {row.get('skip', '')} | {_notes(row)} |"
        )
    return "\n".join(lines) + "\n"


def _notes(row: dict[str, Any]) -> str:
    notes = [row["reason"], *row.get("notes", [])]
    if row.get("kinds", "") != row.get("expected", "") and not row["reason"]:
        notes.append(f"the configuration implies {row['expected']}")
    if row.get("stream", "").startswith("no") and not row["reason"]:
        notes.append(f"the stream differs from what hooks see: {row['stream'][4:]}")
    return "; ".join(filter(None, notes)).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    main()
