"""Is any batch slower than eager? Decode steps of 1, 2, 3, 4 and 8 sequences, and the prompts of each.

Eager and the compiled full model take turns in each round of one process, and a ratio is taken within a round: above 1
the compiled model is faster. Nothing is skipped, so nothing but how the graphs are computed is compared.

    python -m bench.batches --model smollm2 --context 128 --json bench/results/batches_smollm2.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.evaluation.timing import take_turns
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.recording import bench_parser, cell, generate_eagerly, generate_under, numbers, ratios, write

PHASES = ("prefill", "decode")
EAGER, COMPILED = "eager", "compiled"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    rows = [row for dtype in arguments.dtype for row in _rows(dtype, arguments)]
    _show(rows, arguments)
    write({"rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), both_dtypes=True, context=128, rounds=7)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 3, 4, 8], metavar="N", help="sequences at once"
    )
    parser.add_argument("--new-tokens", type=int, default=12, metavar="N", help="decoded a round")
    return parser.parse_args(argv)


def _rows(dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, dtype))
    return [_row(model, dtype, batch, arguments) for batch in arguments.batches]


def _row(model: Any, dtype: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return times in seconds and ratios, each (median, least, greatest), for ``batch`` sequences."""
    ids = torch.randint(10, model.config.vocab_size, (batch, arguments.context), generator=torch.manual_seed(0))
    ways = {
        COMPILED: partial(generate_under, model, ids, SkipPlan.none(), arguments),
        EAGER: partial(generate_eagerly, model, ids, arguments.new_tokens),
    }
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, arguments.rounds)
    row: dict[str, Any] = {"dtype": dtype, "batch": batch}
    for phase in PHASES:
        for way, runs in rounds.items():
            row[f"{phase}_{way}"] = numbers([run.seconds(phase) for run in runs])
        row[f"{phase}_ratio"] = ratios(rounds[EAGER], rounds[COMPILED], phase)
    return row


def _show(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print(f"{arguments.model}, prompts of {arguments.context} tokens, {arguments.threads} threads", file=out)
    print(
        "| numbers | sequences | prompt: eager ms | compiled ms | ratio | decode: eager ms | compiled ms | ratio |",
        file=out,
    )
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | --- |", file=out)
    for row in rows:
        cells = [row["dtype"], str(row["batch"])]
        for phase in PHASES:
            cells += [f"{row[f'{phase}_{way}'][0] * 1e3:.1f}" for way in (EAGER, COMPILED)]
            cells.append(cell(row[f"{phase}_ratio"]))
        print(f"| {' | '.join(cells)} |", file=out)


if __name__ == "__main__":
    raise SystemExit(main())
