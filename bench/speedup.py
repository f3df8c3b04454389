"""How much faster are prefill and decode with k attention sublayers skipped, against the full model?

Every way takes its turn in each round of one process: eager, compiled in full, and compiled with each
skip count. A ratio is taken within a round. Which attentions are skipped does not matter to speed: the
first k after the third are.

    python -m bench.speedup --model smollm2 --context 2048 --skips 8 16 --json bench/results/speedup.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.evaluation.timing import Generation, take_turns
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.recording import bench_parser, cell, generate_eagerly, generate_under, numbers, ratios, write

EAGER = "eager"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    ids = torch.randint(10, model.config.vocab_size, (1, arguments.context), generator=torch.manual_seed(0))
    ways = {EAGER: partial(generate_eagerly, model, ids, arguments.new_tokens)}
    attentions = [item.path for item in adaskip_compile.analyze(model).sublayers if item.kind == "attention"]
    for count in (0, *arguments.skips):
        ways[str(count)] = partial(generate_under, model, ids, _plan(attentions, count), arguments)
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, arguments.rounds)
    rows = [_row(way, rounds) for way in ways]
    _show(rows, arguments)
    write({"rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), context=2048, rounds=5)
    parser.add_argument("--skips", type=int, nargs="+", default=[8, 16], metavar="K")
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N", help="decoded a round")
    return parser.parse_args(argv)


def _plan(attentions: Sequence[str], count: int) -> SkipPlan:
    return SkipPlan.from_scales(dict.fromkeys(attentions[3 : 3 + count], 1.0)) if count else SkipPlan.none()


def _row(way: str, rounds: dict[str, list[Generation]]) -> dict[str, Any]:
    """Return times in seconds and ratios to eager and to the compiled full model, each (median, least, greatest)."""
    row: dict[str, Any] = {"way": way, "kv_bytes": rounds[way][-1].cache_bytes}
    for phase in ("prefill", "decode"):
        row[phase] = numbers([run.seconds(phase) for run in rounds[way]])
        for name, other in (("eager", EAGER), ("full", "0")):
            row[f"{phase}_vs_{name}"] = ratios(rounds[other], rounds[way], phase)
    return row


def _show(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print(f"{arguments.model}, {arguments.context} tokens, {arguments.threads} threads, {arguments.dtype}", file=out)
    print("| skipped | prefill s | vs full | vs eager | decode ms | vs full | vs eager | KV MB |", file=out)
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", file=out)
    for row in rows:
        cells = [cell(row["prefill"], 1, 2)]
        cells += [cell(row[f"prefill_vs_{base}"], 1, 2) for base in ("full", "eager")]
        cells += [cell(row["decode"], 1e3, 1)]
        cells += [cell(row[f"decode_vs_{base}"], 1, 2) for base in ("full", "eager")]
        print(f"| {row['way']} | {' | '.join(cells)} | {row['kv_bytes'] / 1e6:.1f} |", file=out)


if __name__ == "__main__":
    raise SystemExit(main())
