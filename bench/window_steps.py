"""What do probes cost? Decode steps in the window against the same steps without probes.

Both requests skip the same attention sublayers. The window of one never ends, and its threshold is out of reach, so
that every kept FFN is probed in every step.

    python -m bench.window_steps --model smollm2 --context 2048 --json bench/results/window_steps.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.evaluation.timing import take_turns
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.recording import bench_parser, cell, generate_under, numbers, write


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    ids = torch.randint(10, model.config.vocab_size, (1, arguments.context), generator=torch.manual_seed(0))
    attentions = [item.path for item in adaskip_compile.analyze(model).sublayers if item.kind == "attention"]
    steady = SkipPlan.from_scales(dict.fromkeys(attentions[3 : 3 + arguments.skip], 1.0))
    window = replace(steady, beta=2.0, window=10**6)
    ways = {
        name: partial(generate_under, model, ids, plan, arguments)
        for name, plan in (("steady", steady), ("window", window))
    }
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, arguments.rounds)
    pairs = list(zip(rounds["window"], rounds["steady"], strict=True))
    results = {
        "steady_ms": numbers([run.steady(2) * 1e3 for run in rounds["steady"]]),
        "window_ms": numbers([run.steady(2) * 1e3 for run in rounds["window"]]),
        "window_vs_steady": numbers([probed.steady(2) / plain.steady(2) for probed, plain in pairs]),
    }
    out = sys.stderr if arguments.json == "-" else sys.stdout
    for name, value in results.items():
        print(f"{name:18} {cell(value, digits=3)}", file=out)
    write(results, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), context=2048, rounds=5)
    parser.add_argument("--skip", type=int, default=8, metavar="K", help="attention sublayers skipped by both")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoded a round")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
